"""Samples with one sampler after another, and measures the samples."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mlcm_jax.evaluation.measure import (
    Column,
    Measurements,
    Networks,
    Reference,
    column,
    figures,
    sampled_inputs,
)
from mlcm_jax.evaluation.metrics.registry import SEED_METRICS
from mlcm_jax.evaluation.report import Row
from mlcm_jax.evaluation.sampling import SampledBatch, Sampler
from mlcm_jax.evaluation.statistics.bootstrap import Figure, mean_figure
from mlcm_jax.rewards.clip_features import image_features
from mlcm_jax.rng import next_seed

NUM_EXAMPLES = 16  # in the grid


class EvaluationProtocol(NamedTuple):
    """How samplers are measured.

    data_matches_prompts: whether real image i is of prompt i. num_resamples: of the distances between sets, for their
    intervals. seed: of the noise. seed_prompts, num_seeds: how many prompts are sampled from how many seeds, for the
    metrics of several seeds; 0: no such metrics.
    """

    data_matches_prompts: bool
    num_resamples: int
    seed: int
    seed_prompts: int
    num_seeds: int

    def num_images(self, num_prompts: int) -> int:
        """How many images are sampled for a sampler."""
        return num_prompts + self.seed_prompts * self.num_seeds


class Evaluator:
    """Measures samplers of the same prompts from the same noise, one after another.

    data: of the real images, where there are some. The reference, where there is one, comes first, or is given, with
    what was measured of it.
    """

    def __init__(
        self,
        protocol: EvaluationProtocol,
        prompts: list[str],
        networks: Networks,
        data: Measurements | None,
        progress: tqdm,
        *,
        reference: tuple[Reference, Measurements] | None = None,
    ):
        self._protocol, self._prompts, self._networks, self._data = protocol, prompts, networks, data
        self._progress, self.reference = progress, reference

    def measure(self, sampler: Sampler, num_steps: int, *, as_reference: bool = False) -> Row:
        """A row of the report; with ``as_reference``, later ones are compared with these samples."""
        self._progress.set_description(f"{sampler.name} {num_steps}")
        batches = self._sampled(sampler, num_steps, seeds=[self._protocol.seed], n=len(self._prompts))
        samples, reference = self.reference or (None, None)
        if as_reference:
            batches = list(batches)
            samples = Reference.of(batches)
        examples = []

        def with_examples() -> Iterator[SampledBatch]:
            for batch in batches:
                examples.append(batch.images[: max(0, NUM_EXAMPLES - batch.indices.start)])
                yield batch

        measured = self._networks.measure(sampled_inputs(with_examples(), self._prompts, samples))
        if as_reference:
            assert samples
            reference = measured
            self.reference = samples, measured
        found = figures(
            measured,
            self._data,
            reference,
            self._networks,
            data_matches_prompts=self._protocol.data_matches_prompts,
            num_resamples=self._protocol.num_resamples,
        )
        found |= self._seed_figures(sampler, num_steps)
        scheduler, scale = sampler.scheduler, sampler.guidance_scale
        return Row(sampler.name, num_steps, scheduler, scale, found, np.concatenate(examples))

    def _seed_figures(self, sampler: Sampler, num_steps: int) -> dict[Column, Figure]:
        _, _, seed, n, num_seeds = self._protocol
        if not n:
            return {}
        seeds = [next_seed(seed, by) for by in range(num_seeds)]
        batches = self._sampled(sampler, num_steps, seeds=seeds, n=n)
        features = np.concatenate([image_features(self._networks.clip, batch.images) for batch in batches])
        by_seed = features.reshape(num_seeds, n, -1)
        return {column(metric, ""): mean_figure(metric.compute(by_seed)) for metric in SEED_METRICS}

    def _sampled(self, sampler: Sampler, num_steps: int, *, seeds: Sequence[int], n: int) -> Iterator[SampledBatch]:
        for batch in sampler.sample(num_steps, seeds=seeds, n=n):
            yield batch
            self._progress.update(len(batch.images))


def evaluate_samplers(
    protocol: EvaluationProtocol,
    steps: Sequence[int],
    reference_steps: int,
    prompts: list[str],
    networks: Networks,
    samplers: Mapping[str, Sampler],
    data: Measurements | None,
) -> tuple[list[Row], Row | None]:
    """A row for each sampler and number of steps, and the reference's: "baseline" at ``reference_steps``."""
    pairs = [(name, n) for name in samplers for n in steps]
    first = ("baseline", reference_steps)
    if "baseline" in samplers and first not in pairs:
        pairs.append(first)
    order = sorted(pairs, key=first.__ne__)  # the reference before the others, which keep their order
    with tqdm(total=len(order) * protocol.num_images(len(prompts)), unit="image") as progress:
        evaluator = Evaluator(protocol, prompts, networks, data, progress)
        rows = {(name, n): evaluator.measure(samplers[name], n, as_reference=(name, n) == first) for name, n in order}
    return [rows[pair] for pair in pairs], rows.get(first)
