"""A small agent: each tool result is a round of one session, whose history stays on the cluster.

    ampd run --prefill 1 --decode 1 --model smollm2 -- python examples/agent.py

A small model does not choose tools reliably, so this agent calls its tool in a fixed order. What matters here is the
shape: only the new message travels each round, and `usage` says what it cost.
"""

from __future__ import annotations

import asyncio
import os

from shared.client import AmpdClient, ClientSession, RoundResult
from shared.messages import ChatMessage

STOCK = {"lamps": 3, "chairs": 12, "paper": 40}
SYSTEM = "You help in a shop. The tool look_up(item) tells how many pieces are in stock. Answer in one short sentence."


def look_up(item: str) -> str:
    """The agent's tool."""
    return f"Result of look_up({item}): {STOCK[item]} pieces in stock."


async def ask(session: ClientSession, *messages: ChatMessage) -> RoundResult:
    """One round: send the new messages, print the answer as it comes, and what it cost."""
    print(f"\n> {messages[-1].content}")
    stream = await session.submit(messages, max_output_tokens=32)
    async for chunk in stream:
        print(chunk.text, end="", flush=True)
    result = await stream.result()
    usage = result.usage
    print(
        f"\n  [{usage.num_input_tokens} new tokens after {usage.num_cached_tokens} cached, {usage.prefill} prefill, "
        f"{usage.kv_bytes_moved} KV bytes moved, first token after {(result.first_token_s or 0) - result.sent_s:.2f} s]"
    )
    return result


async def main() -> None:
    url = os.environ.get("AMPD_NATS_URL", "nats://127.0.0.1:4222")
    async with await AmpdClient.connect(url) as client, await client.open_session() as session:
        question = "A customer wants five lamps and ten chairs. Can we deliver?"
        await ask(session, ChatMessage(role="system", content=SYSTEM), ChatMessage(role="user", content=question))
        for item in ("lamps", "chairs"):
            await ask(session, ChatMessage(role="user", content=look_up(item)))
        await ask(session, ChatMessage(role="user", content="So, what do I tell the customer?"))


if __name__ == "__main__":
    asyncio.run(main())
