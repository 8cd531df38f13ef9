"""Percentages from budgets: they fit, they use what there is, and more memory is never worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncpipe.errors import Invalid
from asyncpipe.policy import Policy
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.partition import LayerRange, split_layers
from asyncpipe_coordinator.known_models import known_config
from asyncpipe_coordinator.model_files import inspect_model
from asyncpipe_coordinator.planner.demand import StageDemand, stage_demand
from asyncpipe_coordinator.planner.derive import Budget, derive_policy, least_device_bytes
from asyncpipe_coordinator.planner.stages import with_derived_policies
from asyncpipe_coordinator.tensor_shapes import expected_shapes, model_shape

GIB = 2**30
MODELS = ("opt-125m", "opt-350m", "opt-6.7b", "opt-30b", "opt-175b", "galactica-6.7b")
SIZES = st.integers(0, 2**42) | st.integers(0, 2**30)

demands = st.builds(
    StageDemand,
    weights=st.integers(1, 2**40),
    resident_weights=st.integers(1, 2**40),
    cache=st.integers(1, 2**40),
    activations=st.integers(1, 2**32),
    compute=st.integers(1, 2**34),
    weight_buffers=st.integers(1, 2**34),
    cache_workspace=st.integers(1, 2**34),
    rounding=st.integers(1, 2**16),
)
bases = st.builds(Policy, compress_weight=st.booleans(), compress_cache=st.booleans(), overlap=st.booleans())


def demand_of(name: str, policy: Policy, *, layers: LayerRange | None = None, **others: Any) -> StageDemand:
    config = known_config(name)
    assert config is not None
    settings: dict[str, Any] = {"num_micro_batches": 1, "step_tokens": 512, "kv_block_tokens": 32}
    settings |= {"dtype_bytes": 2, "stored_dtype_bytes": 2}
    return stage_demand(
        shapes=expected_shapes(Path(name), config),
        model=model_shape(Path(name), config),
        layers=layers or LayerRange(0, config["num_hidden_layers"]),
        policy=policy,
        **(settings | others),
    )


def used(demand: StageDemand, policy: Policy, tier: str) -> float:
    """Bytes of the shares on a tier."""
    weights = demand.resident_weights if policy.weights.all_on_device else demand.weights
    shares = ((policy.weights, weights), (policy.cache, demand.cache), (policy.activations, demand.activations))
    return sum(getattr(share, tier) / 100 * num_bytes for share, num_bytes in shares)


def working_bytes(demand: StageDemand, policy: Policy) -> int:
    """On the device, beside the shares."""
    buffers = demand.weight_buffers if policy.moves_weights else 0
    workspace = demand.cache_workspace if policy.moves_cache else 0
    return demand.compute + demand.rounding + buffers + workspace


@st.composite
def cases(draw: st.DrawFn) -> tuple[StageDemand, Policy, Budget]:
    """With budgets that are enough, if only just."""
    demand, base = draw(demands), draw(bases)
    least_host = demand.activations + demand.weight_buffers + demand.cache_workspace + demand.rounding
    host = draw(st.none() | SIZES.map(lambda more: least_host + more))
    return demand, base, Budget(device=least_device_bytes(demand, base) + draw(SIZES), host=host)


@settings(deadline=None)
@given(case=cases())
def test_what_is_derived_fits_into_the_budgets(case: tuple[StageDemand, Policy, Budget]) -> None:
    demand, base, budget = case
    policy = derive_policy(demand=demand, budget=budget, base=base)
    assert used(demand, policy, "device") + working_bytes(demand, policy) <= budget.device * (1 + 1e-9)
    if budget.host is None:
        assert policy.weights.disk == policy.cache.disk == policy.activations.disk == 0
    else:
        assert used(demand, policy, "host") <= budget.host * (1 + 1e-9)
    assert policy.activations.disk == 0


@settings(deadline=None)
@given(case=cases(), more=SIZES)
def test_more_memory_never_gives_a_smaller_share(case: tuple[StageDemand, Policy, Budget], more: int) -> None:
    demand, base, budget = case
    small = derive_policy(demand=demand, budget=budget, base=base)
    large = derive_policy(demand=demand, budget=replace(budget, device=budget.device + more), base=base)
    for name in ("weights", "cache", "activations"):
        assert getattr(large, name).device >= getattr(small, name).device
        assert getattr(large, name).disk <= getattr(small, name).disk + 1e-9
    if budget.host is not None:
        roomy = derive_policy(demand=demand, budget=replace(budget, host=budget.host + more), base=base)
        assert roomy.weights.device == small.weights.device
        for name in ("weights", "cache"):
            assert getattr(roomy, name).disk <= getattr(small, name).disk + 1e-9


@settings(deadline=None)
@given(demand=demands, base=bases)
def test_the_least_budget_is_enough_and_a_byte_less_is_not(demand: StageDemand, base: Policy) -> None:
    least = least_device_bytes(demand, base)
    derive_policy(demand=demand, budget=Budget(device=least), base=base)
    with pytest.raises(Invalid, match="too little: working memory alone takes"):
        derive_policy(demand=demand, budget=Budget(device=least - 1), base=base)


@settings(deadline=None)
@given(demand=demands, base=bases)
def test_with_room_for_all_everything_is_on_the_device(demand: StageDemand, base: Policy) -> None:
    policy = derive_policy(demand=demand, budget=Budget(device=2**43, host=0), base=base)
    assert policy.weights.all_on_device and policy.cache.all_on_device and policy.activations.all_on_device


def test_the_message_of_a_budget_that_is_too_small_gives_one_that_is_enough() -> None:
    demand = demand_of("opt-6.7b", Policy())
    with pytest.raises(Invalid) as found:
        derive_policy(demand=demand, budget=Budget(device=2**20), base=Policy())
    mib = int(str(found.value).split("takes ")[1].split("MiB")[0])
    derive_policy(demand=demand, budget=Budget(device=mib * 2**20), base=Policy())


# --- what stages need -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(name=st.sampled_from(MODELS), num_stages=st.integers(1, 12), compress=st.booleans())
def test_the_stages_weights_add_up_to_the_models(name: str, num_stages: int, compress: bool) -> None:
    config = known_config(name)
    assert config is not None
    policy = Policy(compress_weight=compress)
    parts = [demand_of(name, policy, layers=layers).weights for layers in split_layers(config["num_hidden_layers"], num_stages)]
    table = config["vocab_size"] * config["word_embed_proj_dim"]
    assert sum(parts) == demand_of(name, policy).weights + (2 * table if num_stages > 1 else 0)


def test_weights_are_counted_as_they_are_stored() -> None:
    plain, packed = demand_of("opt-30b", Policy()), demand_of("opt-30b", Policy(compress_weight=True))
    assert plain.weights == pytest.approx(55.8 * GIB, rel=0.01)
    embeddings = 2 * (50272 + 2050) * 7168
    assert (packed.weights - embeddings) / (plain.weights - embeddings) == pytest.approx(4.5 / 16, rel=0.001)


def test_keys_and_values_are_counted_for_all_blocks() -> None:
    policy = Policy(gpu_batch_size=4, num_gpu_batches=2)
    demand = demand_of("opt-30b", policy, num_micro_batches=3)
    assert demand.cache == 4 * 2 * 3 * 1024 * 1344 * 1024  # FlexLLMGen has 1344 KiB for a token
    compressed = demand_of("opt-30b", Policy(gpu_batch_size=4, num_gpu_batches=2, compress_cache=True), num_micro_batches=3)
    assert compressed.cache / demand.cache == pytest.approx(4.5 / 16)
    assert demand_of("opt-30b", Policy(gpu_batch_size=1)).cache == 2048 * 1344 * 1024, "a whole context fits at least"


def test_weights_that_stay_are_counted_in_the_dtype_to_compute_in() -> None:
    demand = demand_of("opt-30b", Policy(), dtype_bytes=4)
    assert demand.resident_weights == 2 * demand.weights == 2 * demand_of("opt-30b", Policy()).weights


def test_buffers_hold_three_of_the_largest_unit() -> None:
    hidden = 7168
    feed_forward = 2 * (8 * hidden * hidden + 5 * hidden + 2 * hidden)
    attention = 2 * (4 * hidden * hidden + 4 * hidden + 2 * hidden)
    separate, joined = demand_of("opt-30b", Policy()), demand_of("opt-30b", Policy(sep_layer=False))
    assert separate.weight_buffers == pytest.approx(3 * feed_forward, rel=1e-3)
    assert joined.weight_buffers == pytest.approx(3 * (feed_forward + attention), rel=1e-3)
    assert demand_of("opt-30b", Policy(overlap=False)).weight_buffers == pytest.approx(feed_forward, rel=1e-3)
    packed = demand_of("opt-30b", Policy(compress_weight=True))
    assert packed.weight_buffers == pytest.approx(3 * feed_forward * (1 + 4.5 / 16), rel=1e-3)


# --- a service's stages -----------------------------------------------------------------------------------------------


def derived(**options: Any) -> ServiceConfig:
    config = ServiceConfig(checkpoint=Path("opt-1.3b"), dummy_weights=True, **options)
    model = inspect_model(config.checkpoint, dummy=True)
    layers = split_layers(model.num_layers, config.num_stages, config.split)
    return with_derived_policies(config, model, layers=layers, dtype="float16")


def test_without_budgets_nothing_is_derived() -> None:
    assert derived(num_stages=2).policy == Policy()


def test_each_stage_has_the_policy_and_the_kv_memory_that_fit_it() -> None:
    found = derived(num_stages=2, split=(4, 20), device_memory=2 * GIB, host_memory=64 * GIB, max_sequences=8)
    first, last = found.policy_of(0), found.policy_of(1)
    assert first.weights.all_on_device and first.cache.device > last.cache.device
    assert found.kv_bytes_of(0) == 4 * 16 * 1024 * 2 * 2048 * 2
    assert found.kv_bytes_of(1) == 5 * (found.kv_bytes_of(0) or 0)
    assert found.policy_of(0).gpu_batch_size == 8
    assert found.device_memory is None


def test_steps_are_larger_once_weights_are_moved() -> None:
    assert derived(device_memory=40 * GIB).step_tokens == 512
    assert derived(device_memory=2 * GIB).step_tokens == 4096
    assert derived(device_memory=2 * GIB, max_step_tokens=100).step_tokens == 100


def test_a_wish_for_kv_memory_is_kept() -> None:
    assert derived(device_memory=2 * GIB, kv_bytes=GIB).kv_bytes_of(0) == GIB


def test_the_stage_that_does_not_fit_is_named() -> None:
    with pytest.raises(Invalid, match="stage 0: --device-memory 1MiB is too little"):
        derived(num_stages=2, device_memory=2**20)
    with pytest.raises(Invalid, match="stage 0: --host-memory 1MiB is too little"):
        derived(num_stages=2, device_memory=GIB, host_memory=2**20)
