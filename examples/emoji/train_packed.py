"""The denoiser's training on one GPU: all data on the device, many steps a call, the rate by the clock."""

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from denoiser import make_loss, unet_predict
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict
from packed import Packed
from recipe import IMAGE_SIZE
from training import LossFn, update

from mlcm_jax import rng
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distillation.state import TrainState, create
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import WEIGHT_FILES, Pipeline
from mlcm_jax.hub.save import save_params
from mlcm_jax.sampling.conditioning import encode_prompts
from mlcm_jax.training.flops import count_flops
from mlcm_jax.training.loop import StopOnSignal
from mlcm_jax.training.optimizer import make_optimizer
from mlcm_jax.types import Latents, Params, TextConditioning

LOG_SECONDS, SAVE_SECONDS = 20, 60
KEPT_SNAPSHOTS = 2
PROBE_ROWS = 512


Rows = tuple[Latents, TextConditioning]  # latents: float16
Probe = Callable[[Params], dict[str, float]]


def learning_rate(config: ConfigDict, step: Int[np.ndarray, " k"] | int, fraction: float) -> Float[np.ndarray, " k"]:
    """Linear warm-up by steps; after ``config.hold`` of the time a cosine that reaches 0 at its end.

    fraction: of the run's time that has passed, 0 to 1. Warm-up goes by steps because Adam's moments do.
    """
    warm = np.minimum(1.0, (np.asarray(step) + 1.0) / config.warmup_steps)
    falling = np.clip((fraction - config.hold) / (1.0 - config.hold), 0.0, 1.0)
    return (config.learning_rate * warm * 0.5 * (1.0 + np.cos(np.pi * falling))).astype(np.float32)


def draw_rows(cumulative: Float[Array, " n"], key: Key[Array, ""], batch_size: int) -> Int[Array, " b"]:
    """Rows by their weights, one from each of ``batch_size`` equal parts of the sum: few repeats, no bias."""
    places = (jnp.arange(batch_size) + jax.random.uniform(key, (batch_size,))) / batch_size
    rows = jnp.searchsorted(cumulative, places, side="right", method="compare_all")
    return jnp.minimum(rows, len(cumulative) - 1)  # a place may round up to 1


def ema_decay(config: ConfigDict, step: Int[Array, ""]) -> Float[Array, ""]:
    """Of the moving average at ``step``, by a half-life in examples."""
    seen = (step + 1.0) * config.batch_size
    return jnp.exp2(-config.batch_size / jnp.minimum(config.ema_halflife, config.ema_rampup * seen))


def make_chunk(loss_fn: LossFn, config: ConfigDict) -> Callable:
    """(state, one rate for each step, all rows, sums of their weights) -> (state, mean metrics).

    The last sum is 1. What a batch holds depends on the seed and the step alone.
    """
    optimizer = make_optimizer(config.optim, 1)

    def one(data: Rows, cumulative: Float[Array, " n"], state: TrainState, rate: Float[Array, ""]):
        rows = draw_rows(cumulative, rng.stream(config.seed, "rows", state.step), config.batch_size)
        latents, text = jax.tree.map(lambda a: a[rows], data)
        batch = latents.astype(jnp.float32), text
        decay = ema_decay(config, state.step)
        return update(state, batch, loss_fn, optimizer, seed=config.seed, ema_decay=decay, scale=rate)

    def chunk(state: TrainState, rates: Float[Array, " k"], data: Rows, cumulative: Float[Array, " n"]):
        # Within a loop, were it of one step, XLA's convolutions on a CPU are 50 times slower.
        if len(rates) == 1:
            return one(data, cumulative, state, rates[0])
        state, metrics = jax.lax.scan(partial(one, data, cumulative), state, rates)
        return state, jax.tree.map(jnp.mean, metrics)

    return chunk


def place(pipeline: Pipeline, latents: np.ndarray, captions: list[str]) -> Rows:
    """Latents and text states on the device, the states in the dtype that the network computes in."""
    text = encode_prompts(pipeline, captions, IMAGE_SIZE)
    states = np.asarray(text.hidden_states).astype(pipeline.unet.module.dtype)
    return jax.device_put((latents, text.replace(hidden_states=states)))


def make_probe(loss_fn: LossFn, sets: dict[str, Rows], seed: int) -> Probe:
    """The loss on rows, noise and timesteps that never change: training and held-out values can be compared."""

    @jax.jit
    def probe(params: Params, rows: Rows):
        latents, text = rows
        return loss_fn(params, (latents.astype(jnp.float32), text), rng.stream(seed, "probe", 0))[0]

    return lambda params: {name: float(probe(params, rows)) for name, rows in sets.items()}


class Progress:
    """Writes what finished calls leave: a line of metrics every 20 s, weights every minute.

    metrics.jsonl: "train_loss" is of the batches, "train_probe" and "heldout_probe" of the moving average on fixed
    rows, noise and timesteps without caption dropout.
    """

    def __init__(self, out: Path, config: ConfigDict, unet_config: dict, flops: float, probe: Probe):
        self._out, self._config, self._flops, self._probe = out, config, flops, probe
        self._unet_config = unet_config
        self._begin = self._logged = self._saved = time.perf_counter()
        self._steps = 0

    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def finished(self, state: TrainState, metrics: dict[str, Array], rate: float, *, last: bool = False) -> None:
        """Wait for a call's result. Raises UserError when its loss is not finite."""
        loss, step = float(metrics["loss"]), int(state.step)
        if not np.isfinite(loss):
            raise UserError(f"The loss is {loss} at step {step}: lower --learning_rate; {self._out} has older weights.")
        now = time.perf_counter()
        if last or now - self._logged >= LOG_SECONDS:
            values = {"train_loss": loss, "mse": float(metrics["mse"]), "learning_rate": rate}
            self._write(step, state, values, per_second=(step - self._steps) / (now - self._logged))
            self._logged, self._steps = time.perf_counter(), step
        if last or now - self._saved >= SAVE_SECONDS:
            self.save(state, minute=None if last else round(self.seconds() / 60))
            self._saved = now

    def _write(self, step: int, state: TrainState, values: dict[str, float], per_second: float) -> None:
        line = {"step": step, "examples": step * self._config.batch_size, "seconds": round(self.seconds(), 1), **values}
        line |= self._probe(state.ema) | {
            "examples_per_second": per_second * self._config.batch_size,
            "tflops_per_second": per_second * self._flops / 1e12,
        }
        with (self._out / "metrics.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        print("  ".join(f"{name} {value:.6g}" for name, value in line.items()), flush=True)

    def save(self, state: TrainState, minute: int | None) -> None:
        """The moving average as OUT/unet, float16, and of the last minutes as files of their own."""
        name, folder = WEIGHT_FILES["diffusers"], self._out / "unet"
        file = save_params(state.ema, self._unet_config, folder, file_name=name, dtype=jnp.float16)
        if minute is not None:
            shutil.copyfile(file, self._out / f"unet_minute_{minute:03d}.safetensors")
            for old in sorted(self._out.glob("unet_minute_*.safetensors"))[:-KEPT_SNAPSHOTS]:
                old.unlink()


def train_packed(pipeline: Pipeline, packed: Packed, config: ConfigDict, out: Path, minutes: float) -> Params:
    """Train for ``minutes`` after compilation, on one device; returns the moving average, which is in OUT/unet too.

    SIGTERM writes the weights and ends the program. Raises UserError when the loss is not finite.
    """
    begin = time.perf_counter()
    module, schedule = pipeline.unet.module, Schedule.from_config(pipeline.scheduler_config)
    data = place(pipeline, packed.latents, packed.captions)
    first = jax.tree.map(lambda a: a[:1], data)
    # compiled: op by op it takes half a minute on a GPU
    init = jax.jit(module.init)
    params = init(rng.stream(config.seed, "init", 0), first[0], np.zeros(1, np.int32), first[1])["params"]
    state = create(params, make_optimizer(config.optim, 1), with_ema=True)
    chunk = make_chunk(make_loss(unet_predict(module), schedule), config)
    sums = np.cumsum(packed.weights, dtype=np.float64)
    inputs = data, jax.device_put((sums / sums[-1]).astype(np.float32))
    rates = np.zeros(config.steps_per_call, np.float32)
    flops = count_flops(chunk, state, rates, *inputs) / config.steps_per_call
    print(f"data on the device after {time.perf_counter() - begin:.1f} s", flush=True)
    compiled = jax.jit(chunk).lower(state, rates, *inputs).compile()
    print(f"compiled after {time.perf_counter() - begin:.1f} s", flush=True)
    sets = probe_sets(pipeline, packed, data)
    probe = make_probe(make_loss(unet_predict(module), schedule, caption_dropout=0.0), sets, config.seed)
    gflop, untrained = flops / config.batch_size / 1e9, probe(params)  # compiles it: before the clock starts

    out.mkdir(parents=True, exist_ok=True)
    with StopOnSignal() as stop:
        print(f"{gflop:.3f} GFLOP an example; losses of the first weights: {untrained}", flush=True)
        progress, running, step = Progress(out, config, pipeline.unet.config, flops, probe), None, 0
        while not running or not (stop.requested(step) or progress.seconds() >= 60 * minutes):
            fraction = progress.seconds() / (60 * minutes)
            rates = learning_rate(config, step + np.arange(config.steps_per_call), fraction)
            state, metrics = compiled(state, rates, *inputs)
            step += config.steps_per_call
            if running:  # read only when the next call is queued, so that the device never waits
                progress.finished(*running)
            running = state, metrics, float(rates[-1])
        progress.finished(*running, last=True)
    if stop.requested(step):
        raise SystemExit(f"Stopped by a signal at step {step}: its weights are in {out / 'unet'}.")
    return state.ema


def probe_sets(pipeline: Pipeline, packed: Packed, data: Rows) -> dict[str, Rows]:
    """Rows of both splits, as many of the one as of the other, spread over them."""
    n = min(PROBE_ROWS, len(packed.captions), len(packed.heldout_captions))
    totals = len(packed.captions), len(packed.heldout_captions)
    rows, held = (np.linspace(0, total - 1, n).astype(int) for total in totals)
    heldout = place(pipeline, packed.heldout_latents[held], [packed.heldout_captions[i] for i in held])
    return {"train_probe": jax.tree.map(lambda a: a[rows], data), "heldout_probe": heldout}
