"""Times of single steps on a GPU, asked of aiconfigurator's measured tables: an optional package, imported when used.

How its calls relate, found by comparing them (version 0.12.0):
- a mixed step is shared (all but attention, by the sum of tokens) + attention of the chunk + attention of the decodes;
- a prefill alone is exactly shared(tokens) + attention(history, tokens): the shared part is the same;
- a decode alone is shared(batch) + attention(batch, context) within 0.2 ms: it differs by the logits of the batch only;
- the context of a decode is isl + osl // 2; isl includes the prefix; the attention of the chunk comes divided by
  ceil(isl / ctx_tokens), as if the request were spread evenly over that many steps.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from planner.gpu_models import Gpu, Model
from shared.errors import AmpdError, ErrorCode

PACKAGE = "aiconfigurator_core"
MAX_STEP_TOKENS, MAX_BATCH = 8_192, 512  # of a worker; they size the activations
MEMORY_FRACTION = 0.9  # of the device, as vLLM's gpu_memory_utilization
MEMORY_PARTS = ("weights", "activations", "runtime_overhead", "comm_overhead")
_MS = 1e-3

COMMUNICATION = frozenset({"CustomAllReduce", "MoeDispatch", "Nccl", "P2P"})  # kinds of operations that only copy

PerOp = tuple[str, float, float, str]  # name, ms, energy, "silicon" | "empirical" | "mixed"


class EngineTables(Protocol):
    """The calls of aiconfigurator's EngineHandle that we use; every time is in ms."""

    def mixed_step_breakdown(
        self, ctx_tokens: int, gen_tokens: int, isl: int, osl: int, prefix: int = 0
    ) -> tuple[float, float, float, float]: ...

    def predict_prefill_latency(self, bs: int, isl: int, prefix: int = 0) -> float: ...

    def predict_decode_latency(self, bs: int, isl: int, osl: int = 2) -> float: ...

    def last_provenance(self) -> str | None: ...


class StepTimes(Protocol):
    """The parts of a step, and whole steps to hold their sum against. All times in seconds."""

    def linear_s(self, num_tokens: int) -> float: ...

    def prefill_attention_s(self, history: int, chunk: int) -> float: ...

    def decode_attention_s(self, batch: int, context: int) -> float: ...

    def prefill_s(self, history: int, chunk: int) -> float: ...

    def decode_s(self, batch: int, context: int) -> float: ...

    def mixed_s(self, history: int, chunk: int, batch: int, context: int) -> float:
        """context > history + chunk."""


class MeasuredTimes:
    """Step times out of measured tables. `fallbacks` collects what the tables had to estimate, for the provenance."""

    def __init__(self, tables: EngineTables) -> None:
        self._tables = tables
        self.fallbacks: set[str] = set()

    def _note(self) -> None:
        tier = self._tables.last_provenance()
        if tier is not None:
            self.fallbacks.add(tier)

    def linear_s(self, num_tokens: int) -> float:
        shared = self._tables.mixed_step_breakdown(num_tokens, 0, num_tokens, 2)[1]
        self._note()
        return shared * _MS

    def prefill_attention_s(self, history: int, chunk: int) -> float:
        return max(0.0, self.prefill_s(history, chunk) - self.linear_s(chunk))

    def decode_attention_s(self, batch: int, context: int) -> float:
        attention = self._tables.mixed_step_breakdown(0, batch, context - 1, 2)[3]
        self._note()
        return attention * _MS

    def prefill_s(self, history: int, chunk: int) -> float:
        whole = self._tables.predict_prefill_latency(1, history + chunk, history)
        self._note()
        return whole * _MS

    def decode_s(self, batch: int, context: int) -> float:
        return self._tables.predict_decode_latency(batch, context - 1) * _MS

    def mixed_s(self, history: int, chunk: int, batch: int, context: int) -> float:
        isl = history + chunk
        osl = 2 * (context - isl)
        total, _, chunk_attention, _ = self._tables.mixed_step_breakdown(chunk, batch, isl, osl, history)
        return (total + (-(-isl // chunk) - 1) * chunk_attention) * _MS


class RooflineTimes:
    """Another device's step times: measured ones with the roofline of every operation moved. Not a measurement.

    An operation that takes t on the measured device, of which its roofline is r = max(FLOPs, bytes), takes
    max(r' + (t - r), r' / 0.9) on the other: what is above the roofline (launches, softmax, latency) stays, and no
    more than 90 % of the roofline is ever reached. All-reduces stay as measured (H20 and H100 have the same
    NVLink).
    """

    MOST_OF_ROOFLINE = 0.9

    def __init__(self, engine: CompiledEngine, flops_ratio: float, bandwidth_ratio: float) -> None:
        """The ratios are measured device / other device: above 1, the other device is slower."""
        self._handle = engine.handle
        self._ops = {True: engine.context_ops, False: engine.generation_ops}
        self._flops_ratio = flops_ratio
        self._bandwidth_ratio = bandwidth_ratio

    def linear_s(self, num_tokens: int) -> float:
        return self._time(True, 1, num_tokens, 0, attention=False)

    def prefill_attention_s(self, history: int, chunk: int) -> float:
        return self._time(True, 1, chunk, history, attention=True)

    def decode_attention_s(self, batch: int, context: int) -> float:
        return self._time(False, batch, context, 0, attention=True)

    def prefill_s(self, history: int, chunk: int) -> float:
        return self.linear_s(chunk) + self.prefill_attention_s(history, chunk)

    def decode_s(self, batch: int, context: int) -> float:
        return self._time(False, batch, context, 0, attention=False) + self.decode_attention_s(batch, context)

    def mixed_s(self, history: int, chunk: int, batch: int, context: int) -> float:
        return (
            self.linear_s(chunk + batch)
            + self.prefill_attention_s(history, chunk)
            + self.decode_attention_s(batch, context)
        )

    def _time(self, is_context: bool, batch: int, s: int, prefix: int, *, attention: bool) -> float:
        ops = [op for op in self._ops[is_context] if _is_attention(op) == attention]
        copies = json.dumps([op for op in ops if _is_communication(op)])
        computed = json.dumps([op for op in ops if not _is_communication(op)])
        shape = {"is_context": is_context, "batch_size": batch, "s": s, "prefix": prefix}
        total_ms = sum(float(time_ms) for _, time_ms, _, _ in self._handle.evaluate_ops_json(copies, **shape))
        measured: list[PerOp] = self._handle.evaluate_ops_json(computed, **shape)
        rooflines = self._handle.evaluate_ops_sol_json(computed, **shape)
        for (name, time_ms, _, _), (same_name, _, math_ms, memory_ms) in zip(measured, rooflines, strict=True):
            if name != same_name:
                raise RuntimeError(f"the tables list {name} where the roofline lists {same_name}")
            total_ms += self.move(time_ms, math_ms, memory_ms)
        return total_ms * _MS

    def move(self, time_ms: float, math_ms: float, memory_ms: float) -> float:
        """Milliseconds of one operation; math_ms and memory_ms are its roofline on the measured device."""
        before = max(math_ms, memory_ms)
        after = max(math_ms * self._flops_ratio, memory_ms * self._bandwidth_ratio)
        return max(after + max(0.0, time_ms - before), after / self.MOST_OF_ROOFLINE)


def _is_attention(op: dict[str, Any]) -> bool:
    return any("Attention" in kind for kind in op)


def _is_communication(op: dict[str, Any]) -> bool:
    return not COMMUNICATION.isdisjoint(op)


@dataclass(frozen=True, kw_only=True)
class CompiledEngine:
    """One model at one parallel degree on one system."""

    handle: Any
    context_ops: list[dict[str, Any]]
    generation_ops: list[dict[str, Any]]
    backend: str
    backend_version: str
    num_kv_tokens: int  # 0: the weights do not fit
    num_kv_tokens_beside_weights: int  # the same without activations and overheads: to compare
    memory_bytes: dict[str, int]  # what the device memory goes to beside KV

    def source_shares(self) -> dict[str, float]:
        """Shares of the time of a 2048-token chunk with 32 decodes by source of its operations."""
        per_op: tuple[list[PerOp], ...] = self.handle.mixed_step_breakdown_per_op(2048, 32, 2048, 4096, 0)
        shares: dict[str, float] = {}
        for ops in per_op:
            for _, time_ms, _, source in ops:
                shares[source] = shares.get(source, 0.0) + time_ms
        total = sum(shares.values())
        return {source: round(time_ms / total, 3) for source, time_ms in sorted(shares.items())}


def package_version() -> str:
    """Raises AmpdError INVALID_REQUEST if aiconfigurator-core is not installed."""
    _load("sdk.engine")
    return importlib.metadata.version("aiconfigurator-core")


@contextmanager
def model_folder(model: Model) -> Iterator[str]:
    """A folder with the package's copy of the model's config, so that nothing is asked of a network."""
    package_version()
    configs = Path(str(importlib.import_module(PACKAGE).__file__)).parent / "model_configs"
    source = configs / f"{model.config.replace('/', '--')}_config.json"
    if not source.is_file():
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"aiconfigurator-core has no config of {model.config}: install the version that has it, 0.12",
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(source.read_bytes())
        yield folder


def compile_engine(gpu: Gpu, model: Model, folder: str, degree: int, backend: str = "vllm") -> CompiledEngine:
    """bf16 weights and KV; experts are split like everything else (tensor parallel). Raises AmpdError."""
    engine, memory = _load("sdk.engine"), _load("sdk.memory")
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)  # it warns of tables of models that we do not use
    expert_split = degree if model.experts else 1
    mapping = {
        "tp_size": degree,
        "pp_size": 1,
        "attention_dp_size": 1,
        "moe_tp_size": expert_split,
        "moe_ep_size": 1,
    }
    try:
        handle = engine.EngineHandle.compile(folder, gpu.system, backend, **mapping)
        config = _load("sdk.config_builders").build_model_config(**mapping)
        built = _load("sdk.models").get_model(folder, config, backend)
        database = _load("sdk.perf_database").get_database(gpu.system, backend, "current")
        estimator = memory.KVCacheEstimator.from_request(
            folder,
            gpu.system,
            backend,
            "current",
            max_num_tokens=MAX_STEP_TOKENS,
            max_batch_size=MAX_BATCH,
            **mapping,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"aiconfigurator has no tables for {model.name} on {gpu.system} with {backend}: {error}",
        ) from error
    used = {part: int(estimator.breakdown[f"{part}_bytes"]) for part in MEMORY_PARTS}
    tokens_per_byte = degree / model.kv_bytes_per_token
    memory_bytes = MEMORY_FRACTION * gpu.memory_bytes
    return CompiledEngine(
        handle=handle,
        context_ops=json.loads(engine.build_ops_json(built.context_ops)),
        generation_ops=json.loads(engine.build_ops_json(built.generation_ops)),
        backend=backend,
        backend_version=str(database.version),
        num_kv_tokens=max(0, int((memory_bytes - sum(used.values())) * tokens_per_byte)),
        num_kv_tokens_beside_weights=max(0, int((memory_bytes - used["weights"]) * tokens_per_byte)),
        memory_bytes=used,
    )


def _load(module: str) -> Any:
    try:
        return importlib.import_module(f"{PACKAGE}.{module}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(PACKAGE):
            raise
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            "GPU profiles are made from aiconfigurator's measured tables: pip install aiconfigurator-core==0.12.*",
        ) from error
