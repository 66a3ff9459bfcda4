"""Tool-use sessions in real text: a system prompt with tool descriptions, a question, then one tool result a round.

The text is ours, made from templates; sizes are those of tool use scaled down for a small model on two cores: a
first input of about 150 to 400 tokens, increments of 30 to 120, answers of 8 to 32, 3 to 5 rounds.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadgen.traces import TraceRound
from shared.messages import ChatMessage

LABEL = "synthetic, real text from templates; sizes fitted to tool use (ToolBench: 3 to 5 rounds), scaled down"
# Words, digits and signs: about as many as a byte-pair tokenizer makes tokens, of JSON as of prose.
PIECE = re.compile(r"[A-Za-z]+|\d|[^\w\s]+|_")
MIN_ROUNDS, MAX_ROUNDS = 3, 5
MIN_OUTPUT, MAX_OUTPUT = 8, 32
MIN_DELAY_S, MAX_DELAY_S = 0.05, 1.0

World = Mapping[str, Any]
Step = Callable[[World, random.Random], tuple[str, object]]  # -> (tool, its result)

TOOLS = {
    "get_weather": "get_weather(city, day): the forecast for a city. Returns the low and high in degrees Celsius, "
    "the chance of rain in percent, the wind in km/h and one word for the sky.",
    "calculate": "calculate(expression): evaluates one arithmetic expression with + - * / and brackets. "
    "Returns the expression and its exact value.",
    "list_events": "list_events(day): the user's calendar for a day. Returns for each event the start, the end "
    "and the title, in order of time.",
    "search_facts": "search_facts(query): looks a place up in a small collection of facts. Returns up to two "
    "entries, each with a title and a sentence.",
    "list_files": "list_files(folder): the files of a folder. Returns for each file the name, the size in bytes "
    "and the day it was last changed.",
    "read_file": "read_file(path, lines): the first lines of a text file. Returns them as one string.",
}

FACTS = {
    "Lisbon": "the capital of Portugal, on the north bank of the Tagus close to the Atlantic; yellow trams climb "
    "its seven hills",
    "Vienna": "the capital of Austria, on the Danube; it is known for its coffee houses, its music and the "
    "Ringstrasse around the old town",
    "Kyoto": "the capital of Japan for more than a thousand years; its temples and gardens lie at the foot of "
    "wooded hills",
    "Nairobi": "the capital of Kenya, at about 1,800 metres above the sea; a national park begins at the edge of "
    "the city",
    "Oslo": "the capital of Norway, at the head of a fjord; forests with ski tracks and lakes surround it on "
    "three sides",
    "Quito": "the capital of Ecuador, at about 2,850 metres in a valley of the Andes; its old town is a World "
    "Heritage site",
    "Porto": "the second city of Portugal, where the Douro reaches the ocean; port wine ages in lodges across the "
    "river",
    "Hanoi": "the capital of Vietnam, on the Red River; the lanes of the old quarter are named after the trades "
    "once found there",
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
TITLES = ("Budget review", "Design talk", "Interview", "Team lunch", "Planning", "Call with the printer")
FILES = ("invoice-march.csv", "minutes.txt", "orders.csv", "readme.txt", "travel-notes.md", "stock.csv")
GOODS = ("paper", "lamps", "chairs", "cables", "books", "boxes")


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the user wants, the tools for it, and what they answer, in this order."""

    question: str
    tools: tuple[str, ...]
    steps: tuple[Step, ...]
    follow_up: str  # the last round, when every step was used


def _weather(city: str) -> Step:
    def step(world: World, draws: random.Random) -> tuple[str, object]:
        low = draws.randint(-4, 19)
        forecast = {
            "city": world[city],
            "day": world["day"],
            "low": low,
            "high": low + draws.randint(3, 11),
            "rain_percent": draws.randrange(0, 100, 5),
            "wind_kmh": draws.randint(2, 45),
            "sky": draws.choice(("clear", "cloudy", "overcast", "hazy")),
        }
        return "get_weather", forecast

    return step


def _events(world: World, draws: random.Random) -> tuple[str, object]:
    starts = sorted(draws.sample(range(8, 18), draws.randint(2, 3)))
    titles = draws.sample(TITLES, len(starts))
    events = [
        {"start": f"{hour:02}:00", "end": f"{hour:02}:45", "title": title}
        for hour, title in zip(starts, titles, strict=True)
    ]
    return "list_events", {"day": world["day"], "events": events}


def _facts(city: str) -> Step:
    def step(world: World, draws: random.Random) -> tuple[str, object]:
        return "search_facts", [{"title": world[city], "text": f"{world[city]} is {FACTS[world[city]]}."}]

    return step


def _files(world: World, draws: random.Random) -> tuple[str, object]:
    names = draws.sample(FILES, 3)
    return "list_files", [
        {"name": name, "bytes": draws.randint(200, 90_000), "changed": draws.choice(DAYS)} for name in names
    ]


def _table(world: World, draws: random.Random) -> tuple[str, object]:
    lines = [f"{goods},{draws.randint(1, 40)},{draws.randint(2, 90)}.50" for goods in draws.sample(GOODS, 4)]
    return "read_file", "item,count,price\n" + "\n".join(lines)


def _sum(world: World, draws: random.Random) -> tuple[str, object]:
    count, price, post = draws.randint(2, 40), draws.randint(3, 95), world["count"]
    return "calculate", {
        "expression": f"{count} * {price} + {post}",
        "value": count * price + post,
        "note": "The expression was evaluated from left to right, products before sums, without any rounding.",
    }


SCENARIOS = (
    Scenario(
        question="I can spend {day} either in {city} or in {other}. Compare the weather of the two, find out what "
        "each is known for, and tell me in one sentence where I should go.",
        tools=("get_weather", "search_facts", "calculate"),
        steps=(_weather("city"), _weather("other"), _facts("city"), _facts("other")),
        follow_up="Thank you. What should I pack for that day, and what is the one thing I must not miss there? "
        "Answer in a single short sentence, please.",
    ),
    Scenario(
        question="On {day} I work in {city}. When am I free for a walk outside, and will the weather allow it? "
        "The walk costs me {count} units of my time budget for each half hour.",
        tools=("list_events", "get_weather", "calculate"),
        steps=(_events, _weather("city"), _sum),
        follow_up="Good. Suppose that the first event is cancelled: which hour would you then choose for the walk, "
        "and why? One short sentence is enough.",
    ),
    Scenario(
        question="In the folder reports/{day} there should be a table with our orders. Find it, read it, and work "
        "out what the largest order costs with {count} euros of postage.",
        tools=("list_files", "read_file", "calculate"),
        steps=(_files, _table, _sum),
        follow_up="And which of the items in that table would you order less of next time? Name only one, and give "
        "the reason in half a sentence.",
    ),
    Scenario(
        question="I am writing a postcard from {city} to a friend who lives in {other}. Look both places up, check "
        "the weather here on {day}, and suggest a first line of at most {count} words.",
        tools=("search_facts", "get_weather", "list_files", "read_file"),
        steps=(_facts("city"), _facts("other"), _weather("city")),
        follow_up="That is nice, but a little too formal for an old friend. Please try once more with the same "
        "facts, and let it sound cheerful.",
    ),
)


def synthesise_tool_use_text(draws: random.Random) -> tuple[list[TraceRound], str]:
    """The rounds of one session, and the label of its kind."""
    scenario = draws.choice(SCENARIOS)
    city, other = draws.sample(sorted(FACTS), 2)
    world = {"city": city, "other": other, "day": draws.choice(DAYS), "count": draws.randint(5, 15)}
    num_later = min(draws.randint(MIN_ROUNDS, MAX_ROUNDS) - 1, len(scenario.steps) + 1)
    system = ChatMessage(role="system", content=_describe_tools(scenario.tools))
    question = ChatMessage(role="user", content=scenario.question.format_map(world))
    rounds = [_make_round([system, question], None, draws)]
    for step in scenario.steps[:num_later]:
        tool, result = step(world, draws)
        text = result if isinstance(result, str) else json.dumps(result)
        # Role `user`, because not every model's chat template knows a role for tools.
        message = ChatMessage(role="user", content=f"Result of {tool}:\n{text}\nGo on with the task.")
        rounds.append(_make_round([message], draws.uniform(MIN_DELAY_S, MAX_DELAY_S), draws))
    if num_later > len(scenario.steps):
        message = ChatMessage(role="user", content=scenario.follow_up)
        rounds.append(_make_round([message], draws.uniform(MIN_DELAY_S, MAX_DELAY_S), draws))
    return rounds, LABEL


def _describe_tools(tools: Sequence[str]) -> str:
    lines = [f"{number}. {TOOLS[tool]}" for number, tool in enumerate(tools, start=1)]
    return (
        "You are a careful assistant who can use tools. You have these tools:\n"
        + "\n".join(lines)
        + "\nTo use a tool, write one line that names it with its arguments, for example: "
        f"{TOOLS[tools[0]].split(':')[0]}. You are then given its result. Use one tool at a time. When you know "
        "enough, answer the user briefly, and never invent a result."
    )


def _make_round(messages: list[ChatMessage], delay_s: float | None, draws: random.Random) -> TraceRound:
    return TraceRound(
        input_tokens=sum(len(PIECE.findall(message.content)) for message in messages),
        output_tokens=draws.randint(MIN_OUTPUT, MAX_OUTPUT),
        delay_s=None if delay_s is None else round(delay_s, 3),
        messages=tuple(messages),
    )
