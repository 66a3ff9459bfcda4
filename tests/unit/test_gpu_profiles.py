"""The profiles that ship, and the fit that made them, without the package that has the tables."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from planner import gpu_timing
from planner.gpu_fit import balance_monotone, fit_degree, lower_monotone, measure_errors
from planner.gpu_models import GPUS, MODELS
from planner.gpu_profiles import LEAST_KV_TOKENS, encode_profile, main, make_links, profile_names
from planner.gpu_timing import MeasuredTimes, RooflineTimes
from shared.core.profile import Profile, decode_profile
from shared.core.step_costs import StepCosts
from shared.errors import AmpdError
from shared.profile_files import SHIPPED, load_profile

# |ours / theirs - 1| off the grid: (median, 90th percentile)
ERROR_BOUNDS = {
    "prefill": (0.02, 0.10),
    "prefill_of_256_up": (0.01, 0.06),
    "decode": (0.02, 0.07),
    "mixed": (0.02, 0.08),
}


class AdditiveTables:
    """aiconfigurator's calls with known costs, in ms, and its conventions of isl, osl and prefix."""

    def shared(self, num_tokens: int) -> float:
        return 10.0 + 0.05 * num_tokens

    def chunk_attention(self, history: int, chunk: int) -> float:
        return 0.5 + 2e-6 * chunk * history + 1e-6 * chunk * chunk

    def decode_attention(self, batch: int, context: int) -> float:
        return 0.4 + 4e-5 * batch * context

    def mixed_step_breakdown(
        self, ctx_tokens: int, gen_tokens: int, isl: int, osl: int, prefix: int = 0
    ) -> tuple[float, float, float, float]:
        shared = self.shared(ctx_tokens + gen_tokens)
        chunk = self.chunk_attention(prefix, isl - prefix) / -(-isl // ctx_tokens) if ctx_tokens else 0.0
        decode = self.decode_attention(gen_tokens, isl + osl // 2) if gen_tokens else 0.0
        return shared + chunk + decode, shared, chunk, decode

    def predict_prefill_latency(self, bs: int, isl: int, prefix: int = 0) -> float:
        assert bs == 1
        return self.shared(isl - prefix) + self.chunk_attention(prefix, isl - prefix)

    def predict_decode_latency(self, bs: int, isl: int, osl: int = 2) -> float:
        return self.shared(bs) + self.decode_attention(bs, isl + osl // 2)

    def last_provenance(self) -> str | None:
        return None


@pytest.fixture(params=profile_names())
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(request.param)


def test_every_gpu_and_model_has_its_file_and_no_file_is_left_over() -> None:
    shipped = {path.stem for path in SHIPPED.glob("*.json") if not path.stem.startswith("cpu-")}
    assert shipped == set(profile_names())
    assert len(profile_names()) == len(GPUS) * len(MODELS)


def test_degrees_ascend_and_each_holds_a_useful_batch(profile: Profile) -> None:
    degrees = [one.parallel_degree for one in profile.degrees]
    assert degrees == sorted(set(degrees))
    assert degrees[-1] == profile.links.devices_per_node
    kv_tokens = [one.num_kv_tokens for one in profile.degrees]
    assert kv_tokens[0] >= LEAST_KV_TOKENS
    assert all(2 * a < b for a, b in itertools.pairwise(kv_tokens)), "twice the devices hold the weights once"


def test_tables_ascend_along_every_axis(profile: Profile) -> None:
    for degree in profile.degrees:
        assert min(degree.linear.s) > 0.0
        for grid in (degree.prefill_attention, degree.decode_attention):
            times = np.array(grid.s)
            assert (np.diff(times, axis=0) >= 0.0).all()
            assert (np.diff(times, axis=1) >= 0.0).all()
            assert times[-1, -1] > 10.0 * times[0, 0] > 0.0


def test_more_devices_are_faster_but_not_more_than_linearly(profile: Profile) -> None:
    costs = [StepCosts.from_profile(profile, one.parallel_degree) for one in profile.degrees]
    for few, many in itertools.pairwise(costs):
        assert few.prefill_s(0, 2_048) / 2.0 < many.prefill_s(0, 2_048) < few.prefill_s(0, 2_048)
        assert few.decode_step_s(8, 2_048) / 2.0 < many.decode_step_s(8, 2_048) < few.decode_step_s(8, 2_048)


def test_h100_takes_plausible_times() -> None:
    costs = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
    assert 0.080 < costs.prefill_s(0, 2_048) < 0.140
    assert 0.010 < costs.decode_step_s(1, 1_024) < 0.020
    assert costs.decode_step_s(1, 1_024) < costs.decode_step_s(64, 1_024) < 4.0 * costs.decode_step_s(1, 1_024)


def test_h20_computes_slower_and_reads_faster_than_h100() -> None:
    h20, h100 = (StepCosts.from_profile(load_profile(f"{gpu}-qwen3-32b"), 2) for gpu in ("h20", "h100"))
    assert 4.0 < h20.prefill_s(0, 4_096) / h100.prefill_s(0, 4_096) < 989.0 / 148.0
    assert 3.35 / 4.0 <= h20.decode_step_s(1, 1_024) / h100.decode_step_s(1, 1_024) < 1.0


def test_provenance_has_source_and_errors_within_bounds(profile: Profile) -> None:
    provenance = profile.provenance
    assert "aiconfigurator-core 0.12" in provenance["source"]
    assert "vllm" in provenance["source"]
    assert set(provenance["degrees"]) == {str(one.parallel_degree) for one in profile.degrees}
    for note in provenance["degrees"].values():
        assert note["fallback_tiers"] == []
        assert note["time_share_by_source"]["silicon"] > 0.75
        for kind, (median, p90) in ERROR_BOUNDS.items():
            assert note["errors"][kind]["median"] <= median
            assert note["errors"][kind]["p90"] <= p90


def test_derived_profiles_say_that_they_are_not_measured(profile: Profile) -> None:
    derived = profile.name.startswith("h20-")
    assert ("roofline, not measured" in profile.provenance["kind"]) == derived
    assert ("method" in profile.provenance) == ("method_check" in profile.provenance) == derived


def test_model_figures_are_in_the_profile() -> None:
    assert load_profile("h100-qwen3-32b").kv_bytes_per_token == 262_144
    assert load_profile("h100-llama-3.1-70b").kv_bytes_per_token == 327_680
    assert load_profile("h100-mixtral-8x7b").max_context_tokens == 32_768


def test_files_are_small_and_are_what_encoding_writes(profile: Profile) -> None:
    data = (SHIPPED / f"{profile.name}.json").read_bytes()
    assert len(data) < 40_000
    assert encode_profile(profile) == data
    assert decode_profile(data, profile.name) == profile


def test_fit_recovers_additive_costs() -> None:
    tables = AdditiveTables()
    times = MeasuredTimes(tables)
    degree, changes = fit_degree(times, 2, 400_000, 131_072)
    assert max(changes.values()) == 0.0
    costs = StepCosts(degree, make_links(GPUS[0]), 262_144)
    for history, chunk, batch, context in ((0, 700, 3, 900), (3_000, 100, 40, 9_000), (50_000, 5_000, 7, 60_000)):
        shared = tables.shared(chunk + batch)
        want_ms = shared + tables.chunk_attention(history, chunk) + tables.decode_attention(batch, context)
        assert costs.step_s(batch, context, [(history, chunk)]) == pytest.approx(want_ms / 1e3, rel=0.01)
        want_ms = tables.shared(batch) + tables.decode_attention(batch, context)
        assert costs.decode_step_s(batch, context) == pytest.approx(want_ms / 1e3, rel=0.01)
    errors = measure_errors(degree, times, make_links(GPUS[0]), 131_072, 262_144, seed=3)
    assert all(error["p90"] < 0.01 for error in errors.values())


def test_errors_show_a_wrong_table() -> None:
    degree, _ = fit_degree(MeasuredTimes(AdditiveTables()), 2, 400_000, 131_072)

    class Slower(AdditiveTables):
        def shared(self, num_tokens: int) -> float:
            return 2.0 * super().shared(num_tokens)

    errors = measure_errors(degree, MeasuredTimes(Slower()), make_links(GPUS[0]), 131_072, 262_144, seed=3)
    assert errors["prefill"]["median"] > 0.2


def test_monotone_tables_stay_close() -> None:
    assert balance_monotone(np.array([1.0, 4.0, 1.0, 9.0])) == pytest.approx([1.0, 2.0, 2.0, 9.0])
    slow_point = np.array([[1.0, 2.0, 3.0], [2.0, 9.0, 4.0], [3.0, 4.0, 5.0]])
    assert lower_monotone(slow_point).tolist() == [[1.0, 2.0, 3.0], [2.0, 4.0, 4.0], [3.0, 4.0, 5.0]]


@pytest.mark.parametrize(
    ("time_ms", "math_ms", "memory_ms", "want_ms"),
    [
        (1.8, 1.0, 0.2, 5.8),  # compute-bound: 1.0 becomes 5.0, the 0.8 above it stays
        (1.0, 1.0, 0.2, 5.0 / 0.9),  # nothing above the roofline: 90 % of it is the most
        (1.5, 0.1, 1.0, 1.3),  # memory-bound: 1.0 becomes 0.8
        (1.5, 0.5, 1.0, 3.0),  # memory-bound there, compute-bound here: max(2.5, 0.8) and the 0.5 above
        (0.3, 0.0, 0.0, 0.3),  # latency only
    ],
)
def test_roofline_moves_an_operation(time_ms: float, math_ms: float, memory_ms: float, want_ms: float) -> None:
    engine = gpu_timing.CompiledEngine(
        handle=None,
        context_ops=[],
        generation_ops=[],
        backend="vllm",
        backend_version="0",
        num_kv_tokens=0,
        num_kv_tokens_beside_weights=0,
        memory_bytes={},
    )
    moved = RooflineTimes(engine, flops_ratio=5.0, bandwidth_ratio=0.8)
    assert moved.move(time_ms, math_ms, memory_ms) == pytest.approx(want_ms)


def test_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    with pytest.raises(AmpdError, match=r"pip install aiconfigurator-core==0\.12"):
        gpu_timing.package_version()
    assert main(["--out", str(tmp_path), "--only", "h100-qwen3-32b"]) == 2
    assert "pip install aiconfigurator-core==0.12.*" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "none")]) == 2
    assert "give another --out" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example:" in capsys.readouterr().out
