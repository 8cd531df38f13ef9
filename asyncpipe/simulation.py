"""What a simulated stage is told: `--device sim:layer_ms=10,jitter=0.05`.

A simulated stage's layers only take time. Its processes, sockets, messages and schedules are the real ones, so that pipelines
of any length run on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from asyncpipe.errors import Invalid

PREFIX = "sim"


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """`layer_ms` for each layer and step, and so many microseconds a layer for each prompt and each decode token of it.

    `jitter` is the relative standard deviation of a step's time; `link_ms` delays every message on its way into a stage, and
    the tokens on their way back; `hidden_size` float32 values a token travel between stages. `layers` is the number of layers
    of the simulated model (0: one a stage, or the given MODEL's), `context` its context length, `kv_blocks` the KV memory of
    a stage.
    """

    layer_ms: float = 10.0
    prefill_us_per_token: float = 0.0
    decode_us_per_token: float = 0.0
    jitter: float = 0.0
    link_ms: float = 0.0
    hidden_size: int = 0
    layers: int = 0
    context: int = 4096
    kv_blocks: int = 65_536
    seed: int = 0

    @classmethod
    def parse(cls, device: str) -> Simulation:
        """From "sim" or "sim:name=value,…". Raises Invalid."""
        types = {field.name: float if field.type == "float" else int for field in fields(cls)}
        values: dict[str, float] = {}
        for part in filter(None, device.removeprefix(PREFIX).removeprefix(":").split(",")):
            name, _, text = part.partition("=")
            if name not in types:
                raise Invalid(f"--device {device}: a simulated stage has no {name!r}; it has {', '.join(types)}")
            try:
                values[name] = types[name](text)
            except ValueError:
                raise Invalid(f"--device {device}: {name}={text!r} is not a number") from None
            if not 0 <= values[name] <= 1e9:
                raise Invalid(f"--device {device}: {name}={text} is out of range; use 0 or more")
        simulation = cls(**values)  # type: ignore[arg-type]
        if simulation.context < 2 or simulation.kv_blocks < 1:
            raise Invalid(f"--device {device}: context is at least 2, kv_blocks at least 1")
        return simulation


def is_simulation(device: str) -> bool:
    return device == PREFIX or device.startswith(f"{PREFIX}:")
