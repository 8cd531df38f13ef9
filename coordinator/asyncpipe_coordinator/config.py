"""What a coordinator is told at its start."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from asyncpipe.cores import PIN_MODES, cpus_of_stages, find_cores
from asyncpipe.errors import Invalid
from asyncpipe.policy import MAX_BATCHES, QUANTIZE_FORMS, Placement, Policy
from asyncpipe.simulation import Simulation, is_simulation
from asyncpipe.wire.links import LINK_WISHES, LinkKind
from asyncpipe.wire.messages import MAX_CONTEXT_TOKENS
from asyncpipe_coordinator.core.limits import Schedule

MAX_STAGES = 256
MAX_MICRO_BATCHES = 1024
MAX_SEQUENCES = MAX_BATCHES
MODEL_IMPLS = ("auto", "native", "transformers")
WORKERS = ("local", "external")
DTYPES = ("auto", "float32", "bfloat16", "float16")

DEFAULT_POLICY = Policy()
STEP_TOKENS = 512
STREAMING_STEP_TOKENS = 4096  # a step costs a pass over all weights, so it should be large
STEP_TIMEOUT_S = 120.0
JOIN_TIMEOUT_S = 60.0
EXTERNAL_JOIN_TIMEOUT_S = 3600.0  # people start them, and machines that boot
STREAMING_STEP_TIMEOUT_S = 3600.0  # a pass over a large model on a disk takes long


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Validated on creation: raises Invalid with one line that names the flag."""

    checkpoint: Path  # with dummy weights it may be only the name of a known shape
    dummy_weights: bool = False  # random ones: the checkpoint's files are not needed
    num_stages: int = 1
    split: tuple[int, ...] | None = None  # decoder layers of each stage; None: even
    num_micro_batches: int | None = None  # None: chosen from what is measured, and chosen again as that changes
    max_sequences: int | None = None  # in one micro-batch; None: the policy's block
    max_step_tokens: int | None = None  # prompt tokens and sequences of one step together; None: by the policy
    policy: Policy | tuple[Policy, ...] = DEFAULT_POLICY  # of all stages, or of each
    device_memory: int | None = None  # bytes of each stage, from which percentages are derived; None: the policy has them
    host_memory: int | None = None  # ... and bytes on the host; None: there is room for all
    offload_dir: Path | None = None  # for what is on disk; None: the system's temporary folder
    kv_bytes: int | tuple[int, ...] | None = None  # of each stage; None: a share of what is free
    kv_block_tokens: int = 32
    kv_dtype: str = "auto"  # of keys and values; auto: the worker's choice
    schedule: Schedule = Schedule.CONTINUOUS
    max_waiting: int = 4096  # requests that wait for a place before the answer is Busy
    dtype: str = "auto"
    model_impl: str = "auto"  # native: our code; transformers: its layers; auto: ours where there is any
    quantize: str | None = None  # the form in which matrices are multiplied: int8 or int4; None: in dtype
    device: str = "cpu"
    threads_per_stage: int | None = None  # None: the machine's cores, shared out
    pin: str = "auto"  # which cores a stage keeps to: auto, cores or off (asyncpipe.cores)
    workers: str = "local"  # or external: whoever joins, from this machine or another
    spares: int = 0  # local workers that wait to take a lost one's place
    link: str = "auto"  # for hidden states: zmq, gloo, nccl, or the best that two neighbours have
    model_name: str = ""  # where external workers look when they do not have `checkpoint`: see LoadStage.model
    max_restarts: int = 3  # of stages, within restart_period_s; 0: the first loss is the end
    restart_period_s: float = 60.0
    join_timeout_s: float | None = None  # None: by where the workers come from
    load_timeout_s: float = 600.0
    step_timeout_s: float | None = None  # None: by the policy

    def __post_init__(self) -> None:
        _check_range("--stages", self.num_stages, low=1, high=MAX_STAGES)
        _check_range("--spares", self.spares, low=0, high=MAX_STAGES)
        _check_range("--max-restarts", self.max_restarts, low=0, high=1_000_000)
        if self.workers not in WORKERS:
            raise Invalid(f"--workers {self.workers}: use one of {', '.join(WORKERS)}")
        if self.link not in LINK_WISHES:
            raise Invalid(f"--link {self.link}: use one of {', '.join(LINK_WISHES)}")
        if self.spares and not self.workers_are_local:
            raise Invalid("--spares is for --workers local; of external workers, all that join beyond --stages are spares")
        if self.num_micro_batches is not None:
            _check_range("--micro-batches", self.num_micro_batches, low=1, high=MAX_MICRO_BATCHES)
        if self.threads_per_stage is not None:
            _check_range("--threads-per-stage", self.threads_per_stage, low=1, high=1024)
        _check_range("--max-sequences", self.micro_batch_sequences, low=1, high=MAX_SEQUENCES)
        _check_range("--max-step-tokens", self.step_tokens, low=1, high=MAX_CONTEXT_TOKENS)
        if self.pin not in PIN_MODES:
            raise Invalid(f"--pin {self.pin}: use one of {', '.join(PIN_MODES)}")
        _ = self.cpus  # raises Invalid where there are too few
        if self.dtype not in DTYPES:
            raise Invalid(f"--dtype {self.dtype}: use one of {', '.join(DTYPES)}")
        if self.kv_dtype not in DTYPES:
            raise Invalid(f"--kv-dtype {self.kv_dtype}: use one of {', '.join(DTYPES)}")
        self._check_quantize()
        if self.model_impl not in MODEL_IMPLS:
            raise Invalid(f"--model-impl {self.model_impl}: use one of {', '.join(MODEL_IMPLS)}")
        if self.simulation is None and self.device != "cpu" and not self.device.startswith("cuda"):
            raise Invalid(f"--device {self.device}: use cpu, cuda or sim:layer_ms=10")
        self._check_policies()
        if self.offload_dir is not None:
            _check_directory("--offload-dir", self.offload_dir)

    def _check_quantize(self) -> None:
        if self.quantize is None:
            return
        if self.quantize not in QUANTIZE_FORMS:
            raise Invalid(f"--quantize {self.quantize}: use one of {', '.join(QUANTIZE_FORMS)}")
        if self.simulation is not None:
            raise Invalid(f"--quantize {self.quantize} is for weights, and --device {self.device} has none")
        if self.moves_weights or self.device_memory is not None:
            raise Invalid(
                f"--quantize {self.quantize} keeps all weights where they are multiplied; for weights on other tiers, and for"
                " memory budgets, use --compress-weight"
            )

    def _check_policies(self) -> None:
        policies = self.policies
        if isinstance(self.policy, tuple) and len(policies) != self.num_stages:
            raise Invalid(
                f"--policy has {len(policies)} stages for --stages {self.num_stages}; give one for each stage, or one for all"
            )
        for policy in policies:
            if policy.block_size != self.micro_batch_sequences and not _has_default_batches(policy):
                raise Invalid(
                    f"a micro-batch has {self.micro_batch_sequences} sequences, a policy's gpu_batch_size x num_gpu_batches is"
                    f" {policy.gpu_batch_size} x {policy.num_gpu_batches} = {policy.block_size}; they must be equal"
                )
        if self.host_memory is not None and self.device_memory is None:
            raise Invalid("--host-memory bounds what does not fit into --device-memory; give that too")
        if self.device_memory is not None and any(policy.placement is Placement.FLEXLLMGEN for policy in policies):
            raise Invalid("--device-memory with --placement flexllmgen: whole tensors cannot keep to it; use --placement exact")
        if self.simulation is not None and (
            self.device_memory is not None or any(policy != DEFAULT_POLICY for policy in policies)
        ):
            raise Invalid(f"--device {self.device} takes no policy and no memory budget: simulated stages hold nothing")

    @property
    def simulation(self) -> Simulation | None:
        """Raises Invalid for one that cannot be."""
        return Simulation.parse(self.device) if is_simulation(self.device) else None

    @property
    def workers_are_local(self) -> bool:
        return self.workers == "local"

    @property
    def link_wish(self) -> str:
        """Of a stage to the next one. Where it can only be one, workers need not talk about it."""
        may_have_cards = self.device.startswith("cuda") or not self.workers_are_local
        return LinkKind.ZMQ if self.link == "auto" and not may_have_cards else self.link

    @property
    def join_deadline_s(self) -> float:
        """For workers to come, at the start and when one has been lost."""
        if self.join_timeout_s is not None:
            return self.join_timeout_s
        return JOIN_TIMEOUT_S if self.workers_are_local else EXTERNAL_JOIN_TIMEOUT_S

    @property
    def threads(self) -> int:
        """Compute threads of one stage, so that the stages of this machine together use its cores once."""
        return self.threads_per_stage or max(1, find_cores().count // self.num_stages)

    def threads_of(self, num_cores: int, *, num_neighbours: int) -> int:
        """... of a worker that may use `num_cores` cores, when so many stages are on its machine, itself included."""
        if self.workers_are_local:
            return self.threads
        return self.threads_per_stage or max(1, num_cores // num_neighbours)

    @property
    def oversubscribes(self) -> bool:
        """Whether more threads were asked for than there are cores."""
        return self.device == "cpu" and self.threads > 1 and self.num_stages * self.threads > find_cores().count

    @property
    def cpus(self) -> list[tuple[int, ...]] | None:
        """That each stage keeps to; None: any."""
        if self.device != "cpu" or not self.workers_are_local:
            return None
        return cpus_of_stages(find_cores(), self.pin, num_stages=self.num_stages, threads=self.threads)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """One for each stage, or one for all."""
        return self.policy if isinstance(self.policy, tuple) else (self.policy,)

    def policy_of(self, stage: int) -> Policy:
        """Its block is what a micro-batch holds."""
        policy = self.policies[stage if len(self.policies) > 1 else 0]
        if policy.block_size == self.micro_batch_sequences:
            return policy
        return replace(policy, gpu_batch_size=self.micro_batch_sequences, num_gpu_batches=1)

    def kv_bytes_of(self, stage: int) -> int | None:
        return self.kv_bytes[stage] if isinstance(self.kv_bytes, tuple) else self.kv_bytes

    @property
    def micro_batch_sequences(self) -> int:
        """At most so many are in one micro-batch."""
        return self.policies[0].block_size if self.max_sequences is None else self.max_sequences

    @property
    def step_tokens(self) -> int:
        """Of prompts and sequences together, in one step."""
        if self.max_step_tokens is not None:
            return self.max_step_tokens
        return STREAMING_STEP_TOKENS if self.moves_weights else STEP_TOKENS

    @property
    def moves_weights(self) -> bool:
        """Of any stage: then a step costs a pass over them, however small it is."""
        return any(policy.moves_weights for policy in self.policies)

    @property
    def step_deadline_s(self) -> float:
        """A step that takes longer is lost."""
        if self.step_timeout_s is not None:
            return self.step_timeout_s
        moves = self.moves_weights or any(policy.moves_cache for policy in self.policies)
        return STREAMING_STEP_TIMEOUT_S if moves else STEP_TIMEOUT_S

    def device_of(self, stage: int) -> str:
        """`cuda` gives stage k the card k; anything else is every stage's device."""
        return f"cuda:{stage}" if self.device == "cuda" else self.device


def _check_range(flag: str, value: int, *, low: int, high: int) -> None:
    if not low <= value <= high:
        raise Invalid(f"{flag} {value}: use a number from {low} to {high}")


def _has_default_batches(policy: Policy) -> bool:
    batches = (policy.gpu_batch_size, policy.num_gpu_batches)
    return batches == (DEFAULT_POLICY.gpu_batch_size, DEFAULT_POLICY.num_gpu_batches)


def _check_directory(flag: str, path: Path) -> None:
    """It is there or can be made: the nearest that is there is a directory to write to."""
    whole = path.absolute()
    nearest = next(parent for parent in (whole, *whole.parents) if os.path.exists(parent))
    if not nearest.is_dir():
        raise Invalid(f"{flag} {path}: {nearest} is not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise Invalid(f"{flag} {path}: {nearest} is not writable")
