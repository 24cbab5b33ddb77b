"""Losses beside the consistency loss, each with a weight in the configuration and, where it needs one, a network that
is trained against the student. They see the student's clean latents x0 and need no image.

distribution_matching: DMD (arXiv 2311.18828). adversarial: a discriminator on the frozen teacher's features.
preference: a frozen judge of the decoded latents (arXiv 2406.05768, 2304.05977).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from mlcm_jax.diffusion.parameterization import add_noise, predict_x0_eps
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distillation.frozen_networks import Auxiliary
from mlcm_jax.distillation.losses import adversarial
from mlcm_jax.distillation.losses import distribution_matching as matching
from mlcm_jax.distillation.losses.preference import FORMS
from mlcm_jax.distillation.microbatches import LossFn, value_and_grad
from mlcm_jax.distillation.state import Rival, student_variables
from mlcm_jax.distillation.trajectory import PredictX0
from mlcm_jax.models.discriminator import DiscriminatorHeads, block_features, is_encoder_block
from mlcm_jax.models.unet import guidance_embedding
from mlcm_jax.parallel.sharding import split_batch
from mlcm_jax.types import Latents, Params, TextConditioning, Timesteps

# the denoiser's own prediction: (variables, latents, timesteps, conditioning, **flax's options)
Apply = Callable[..., Any]


class Told(NamedTuple):
    """What is asked of the denoisers, a row an example."""

    conditioning: TextConditioning
    guidance_scale: Float[Array, " n"]


class Inputs(NamedTuple):
    """What a term sees. x0: the student's clean latents. clean: what a multistep sample or the data has in their place,
    None where states come from trajectories. teacher_x0: guided. auxiliary: weights of further frozen networks, and
    judge_tokens: the prompts for judges among them, both by role (distillation.frozen_networks)."""

    x0: Latents
    clean: Latents | None
    told: Told
    teacher: Params
    teacher_x0: PredictX0
    key: Key[Array, ""]
    auxiliary: dict[str, Params]
    judge_tokens: dict[str, Array]


Reported = dict[str, Float[Array, ""]]  # what a term adds to the metrics, without gradient


class Shapes(NamedTuple):
    """ShapeDtypeStructs of the teacher's weights and of a batch."""

    teacher: Params
    conditioning: TextConditioning
    latents: jax.ShapeDtypeStruct


@runtime_checkable
class Term(Protocol):
    """A loss on the student."""

    def loss(self, rival: Params, inputs: Inputs) -> tuple[Float[Array, ""], Reported]:
        """What the student minimises, before the weight. rival: {} for a term that has none."""
        ...


@runtime_checkable
class RivalTerm(Term, Protocol):
    """One with a rival also says how the rival starts and what it learns."""

    def init_rival(self, key: Key[Array, ""], student: Params, shapes: "Shapes") -> Params:
        """The rival's weights at the start, float32. student: trained weights that leave the student the teacher."""
        ...

    def rival_loss(self, rival: Params, inputs: Inputs) -> Float[Array, ""]:
        """What the rival minimises; x0 has no gradient."""
        ...


@dataclasses.dataclass(frozen=True)
class Setting:
    """What terms are made of."""

    apply: Apply
    schedule: Schedule
    config: ConfigDict
    auxiliary: Auxiliary = Auxiliary()  # noqa: RUF009  (frozen)
    student_apply: Apply | None = None

    def student_output(self, variables: Params, z: Latents, t: Timesteps, told: Told) -> Latents:
        """The prediction of the student, or of a network like it: told its guidance scale, or not."""
        if not self.config.guidance_embedding_dim:
            return self.apply(variables, z, t, told.conditioning)
        embedding = guidance_embedding(told.guidance_scale, self.config.guidance_embedding_dim)
        return cast(Apply, self.student_apply)(variables, z, t, told.conditioning, embedding)

    def renoise(self, inputs: Inputs, latents: Latents) -> tuple[Latents, Latents, Array]:
        """Latents noised to random timesteps, the noise and the timesteps: the same for every call with a key."""
        time_key, noise_key = jax.random.split(inputs.key)
        t = jax.random.randint(time_key, (len(latents),), matching.LOWEST, matching.HIGHEST + 1)
        noise = jax.random.normal(noise_key, latents.shape)
        return add_noise(self.schedule, latents, noise, t), noise, t


class DistributionMatching(Setting):
    """The rival is a fake score: a denoiser, the teacher at first, that learns what the student draws."""

    def init_rival(self, key, student, shapes):
        return jax.tree.map(jnp.copy, student)

    def _output(self, rival, inputs, z, t):
        variables = student_variables(rival, inputs.teacher, self.config)
        return self.student_output(variables, z, t, inputs.told)

    def loss(self, rival, inputs):
        z, _, t = self.renoise(inputs, inputs.x0)
        z = jax.lax.stop_gradient(z)
        fake = predict_x0_eps(self.schedule, self._output(rival, inputs, z, t), z, t).x0
        return matching.matching_loss(inputs.x0, inputs.teacher_x0(z, t), fake).mean(), {}

    def rival_loss(self, rival, inputs):
        z, noise, t = self.renoise(inputs, inputs.x0)
        output = self._output(rival, inputs, z, t)
        return matching.fake_score_loss(self.schedule, output, inputs.x0, noise, t).mean()


class Adversarial(Setting):
    """The rival is a set of heads on the frozen teacher's features of renoised latents."""

    @property
    def heads(self) -> DiscriminatorHeads:
        return DiscriminatorHeads(self.config.adversarial.width)

    def init_rival(self, key, student, shapes):
        t = jax.ShapeDtypeStruct(shapes.latents.shape[:1], jnp.int32)
        features = jax.eval_shape(self._features, shapes.teacher, shapes.latents, t, shapes.conditioning)
        zeros = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), features)
        return self.heads.init(key, zeros)["params"]

    def _features(self, teacher, z, t, conditioning):
        """Outputs of the encoder's and the middle blocks; the decoder's work is never run."""
        variables = {"params": teacher}
        _, captured = self.apply(
            variables, z, t, conditioning, capture_intermediates=is_encoder_block, mutable=["intermediates"]
        )
        return block_features(captured["intermediates"])

    def _logits(self, rival, inputs, latents):
        z, _, t = self.renoise(inputs, latents)
        features = self._features(inputs.teacher, z, t, inputs.told.conditioning)
        return cast(list[Array], self.heads.apply({"params": rival}, features))

    def loss(self, rival, inputs):
        return adversarial.generator_loss(self._logits(rival, inputs, inputs.x0)), {}

    def rival_loss(self, rival, inputs):
        real, fake = (self._logits(rival, inputs, latents) for latents in (inputs.clean, inputs.x0))
        return adversarial.discriminator_loss(real, fake)


class Preference(Setting):
    """A scorer's judgement of the decoded latents. A guard, another judge, is reported and never learnt from: where its
    score falls while the scorer's rises, the student exploits the scorer."""

    def loss(self, rival, inputs):
        settings = self.config.preference

        def judged(x0):
            images = split_batch(self.auxiliary.decode(inputs.auxiliary, split_batch(x0)))
            score = partial(self.auxiliary.score, inputs.auxiliary)
            scores, negative = score("scorer", images, inputs.judge_tokens["scorer"]), None
            if settings.form == "margin":
                tokens = self.auxiliary.negative_tokens(settings.negative_prompt, len(images))
                negative = score("scorer", images, tokens)
            reported = {"score": scores.mean()}
            if "guard" in self.auxiliary.judges:
                reported["guard"] = score("guard", images, inputs.judge_tokens["guard"]).mean()
            return FORMS[settings.form](scores, negative, settings.target).mean(), jax.lax.stop_gradient(reported)

        # A decoder's activations are the largest of a step.
        return (jax.checkpoint(judged) if self.config.remat else judged)(inputs.x0)


TERMS: dict[str, type[Setting]] = {
    "distribution_matching": DistributionMatching,
    "adversarial": Adversarial,
    "preference": Preference,
}
RIVAL_TERMS = ("distribution_matching", "adversarial")


def rival_terms(setting: Setting) -> dict[str, RivalTerm]:
    """Those of the active terms that have a rival."""
    return {name: cast(RivalTerm, term) for name, term in active_terms(setting).items() if name in RIVAL_TERMS}


def active_terms(setting: Setting) -> dict[str, Term]:
    """The terms whose weight is above 0 in the configuration of a stage."""
    return {name: cast(Term, term(**vars(setting))) for name, term in TERMS.items() if setting.config[name].weight > 0}


def rival_optimizer(config: ConfigDict, name: str) -> optax.GradientTransformation:
    """Adam without momentum, as is usual for rivals, after clipping by global norm."""
    rate, eps = config[name].learning_rate, config.optim.eps
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.0, b2=0.99, eps=eps))


def create_rivals(setting: Setting, key: Key[Array, ""], student: Params, shapes: Shapes) -> dict[str, Rival]:
    """The rivals of a stage's terms at their start. student: trained weights that leave it the teacher."""
    rivals = {}
    for name, term in rival_terms(setting).items():
        params = term.init_rival(key, student, shapes)
        rivals[name] = Rival(params, rival_optimizer(setting.config, name).init(params))
    return rivals


def train_rival(
    loss_fn: LossFn, rival: Rival, rows: Any, key: Key[Array, ""], config: ConfigDict, name: str
) -> tuple[Rival, Array]:
    """``updates`` updates of a rival on the student's latents, each with other noise; returns its last loss."""
    optimizer = rival_optimizer(config, name)

    def update(i, carry):
        rival, _ = carry
        again = jax.random.fold_in(key, i)
        (loss, _), grads = value_and_grad(loss_fn, rival.params, rows, again, config.microbatches)
        updates, opt_state = optimizer.update(grads, rival.opt_state, rival.params)
        return Rival(cast(Params, optax.apply_updates(rival.params, updates)), opt_state), loss

    start = (rival, jnp.float32(0))
    if config[name].updates == 1:  # on the CPU, gradients of convolutions are slow in a loop (jax issue 12868)
        return update(0, start)
    return jax.lax.fori_loop(0, config[name].updates, update, start)
