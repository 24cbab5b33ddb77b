"""The batches of a run: the conditioning of its prompts, each encoded once, the same bits wherever it begins."""

import math
from contextlib import closing
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_runs import settings

from mlcm_jax.data.prompts import TextLines, shuffled
from mlcm_jax.data.text_states import TextState, TextStates, TextStatesWriter
from mlcm_jax.distillation.frozen_networks import FrozenNetworks
from mlcm_jax.distillation.state import Frozen
from mlcm_jax.errors import UserError
from mlcm_jax.hub.model_index import TEXT_ENCODERS
from mlcm_jax.hub.pipeline import conditioning_shapes, load_pipeline, read_architecture
from mlcm_jax.parallel.sharding import batch_sharding, make_mesh
from mlcm_jax.sampling.conditioning import encode_prompts
from mlcm_jax.training import input_pipeline
from mlcm_jax.training.batch_plan import batch_plan
from mlcm_jax.training.input_pipeline import InputPipeline
from mlcm_jax.training.program import StageProgram
from mlcm_jax.training.stages import num_buckets, read_stages
from mlcm_jax.training.text_conditioning import open_states, read_texts
from mlcm_jax.types import Batch

PROMPTS = TextLines([f"an image of {thing}" for thing in ("a cat", "a dog", "the sun", "rain", "a red house")])
STAGES = ({"start": 7, "num_segments": 1}, {"start": 12, "states": "mds"})
NUM_STEPS = 14
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def pipeline(sdxl_folder):
    return load_pipeline(sdxl_folder, parts=TEXT_ENCODERS)


def make_program(pipeline, mesh, **values):
    """What an input pipeline asks of a run's program; the steps are not built, as tracing them takes its time."""
    config = settings(batch_size=16, num_segments=3, num_steps=NUM_STEPS, seed=2**63 + 5, stages=STAGES, **values)
    config.mesh.update(mesh)
    devices = make_mesh(config.mesh, jax.devices()[: math.prod(mesh.values())])
    replicated = NamedSharding(devices, PartitionSpec())

    def shapes(n, sharding):
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), conditioning_shapes(pipeline, n)
        )

    row = jax.ShapeDtypeStruct((16,), np.int32, sharding=batch_sharding(devices))
    batch = Batch(shapes(16, batch_sharding(devices)), row, row, row, row)
    return SimpleNamespace(
        config=config,
        mesh=devices,
        stages=tuple(
            StageProgram(stage, None, batch, 0.0) for stage in read_stages(config) for _ in range(num_buckets(config))
        ),
        frozen=Frozen({}, shapes(1, replicated)),
        networks=FrozenNetworks(),
        image_size=(32, 32),
        image_sizes=config.buckets or ((32, 32),),
    )


@pytest.fixture(scope="module")
def program(pipeline):
    return make_program(pipeline, MESH)


@pytest.fixture(scope="module")
def batches(program, pipeline):
    with closing(InputPipeline(program, pipeline, PROMPTS)) as batches_of:
        return [jax.device_get(batches_of(step).batch) for step in range(NUM_STEPS)]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_every_example_has_the_conditioning_of_its_prompt(program, pipeline, batches):
    encoded = jax.device_get(encode_prompts(pipeline, [texts[0] for texts in PROMPTS.__getitems__(range(5))], 32))
    stages = tuple(stage.stage for stage in program.stages)
    for step, batch in enumerate(batches):
        rows = batch_plan(stages, step)
        expected = [place.row for place in shuffled(rows.prompts, len(PROMPTS), program.config.seed)]
        np.testing.assert_array_equal(batch.trajectory_step, rows.trajectory_step)
        np.testing.assert_array_equal(batch.seed, [2**31, program.config.seed % 2**32])
        for name in ("hidden_states", "pooled"):
            wanted = np.asarray(getattr(encoded, name))[expected]
            np.testing.assert_allclose(getattr(batch.conditioning, name), wanted, atol=1e-5)
        np.testing.assert_array_equal(batch.conditioning.time_ids, np.tile([32, 32, 0, 0, 32, 32], (16, 1)))


@pytest.mark.parametrize("start", [5, 9, 13])
def test_a_pipeline_that_begins_in_the_middle_gives_the_same_bits(program, pipeline, batches, start):
    with closing(InputPipeline(program, pipeline, PROMPTS)) as batches_of:
        for step in (start, start + 1, 3)[: 3 if start < 13 else 1]:
            assert_equal(jax.device_get(batches_of(step).batch), batches[step])


def test_sizes_in_turn_have_trajectories_of_their_own_and_resume_to_the_bit(pipeline):
    sizes = ((32, 32), (16, 48), (48, 16))
    program = make_program(pipeline, MESH, buckets=sizes)
    with closing(InputPipeline(program, pipeline, PROMPTS)) as batches_of:
        whole = [jax.device_get(batches_of(step).batch) for step in range(NUM_STEPS)]
    for step, batch in enumerate(whole):
        height, width = sizes[step % 3]
        np.testing.assert_array_equal(batch.conditioning.time_ids[0], [height, width, 0, 0, height, width])
    stages = tuple(read_stages(program.config))
    encoded = jax.device_get(encode_prompts(pipeline, [texts[0] for texts in PROMPTS.__getitems__(range(5))], 32))
    for step, batch in enumerate(whole):
        rows = [p.row for p in shuffled(batch_plan(stages, step).prompts, len(PROMPTS), program.config.seed)]
        np.testing.assert_allclose(batch.conditioning.pooled, np.asarray(encoded.pooled)[rows], atol=1e-5)
    for start in (4, 6, 11):
        with closing(InputPipeline(program, pipeline, PROMPTS)) as batches_of:
            for step in range(start, NUM_STEPS):
                assert_equal(jax.device_get(batches_of(step).batch), whole[step])


def test_a_streamed_prompt_is_encoded_once(program, pipeline, monkeypatch):
    encode, counts = input_pipeline.encode_tokens, []

    def counted(pipeline, tokens, sharding):
        counts.append(len(tokens[0]))
        return encode(pipeline, tokens, sharding)

    monkeypatch.setattr(input_pipeline, "encode_tokens", counted)
    with closing(InputPipeline(program, pipeline, PROMPTS)) as batches_of:
        for step in range(NUM_STEPS):
            batch = batches_of(step).batch
            for array in jax.tree.leaves((batch.conditioning, batch.trajectory_step)):
                assert array.sharding == program.stages[0].batch.trajectory_step.sharding
    # Trajectories are 4 long, then 2: a quarter of the 16 examples begins at a step, all of them where a stage does.
    assert counts == [4] * 4 + [4] * 6 + [8] * 2 + [8] * 4 + [16] * 2


def write_states(pipeline, path, negative_prompt=""):
    def states(prompts):
        conditioning = jax.device_get(encode_prompts(pipeline, prompts, 32))
        return TextState(conditioning.hidden_states, conditioning.pooled)

    writer = TextStatesWriter(path)
    for texts in PROMPTS.__getitems__(range(len(PROMPTS))):
        writer.write(texts, states(texts))
    writer.finish(states([negative_prompt]), negative_prompt, states(["a grid", "of two"]), ["a grid", "of two"])


def test_text_states_of_a_file_take_the_encoders_place(pipeline, batches, tmp_path):
    write_states(pipeline, tmp_path / "states", negative_prompt="blur")
    asked = {"text_states": str(tmp_path / "states"), "negative_prompt": "blur"}
    program = make_program(pipeline, MESH, **asked)
    states = open_states(program, PROMPTS, ["a grid", "of two"])
    without = load_pipeline(pipeline.folder, parts=("unet",))
    with closing(InputPipeline(program, without, PROMPTS, states=states)) as batches_of:
        for step in (6, 7, 13):
            for a, b in zip(jax.tree.leaves(batches_of(step).batch), jax.tree.leaves(batches[step]), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)
    texts, expected = (
        read_texts(program, p, ["a grid", "of two"], s) for p, s in ((without, states), (pipeline, None))
    )
    for a, b in zip(jax.tree.leaves(texts), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


WRONG = {
    "other prompts": ({}, TextLines(["a", "b", "c", "d", "e"]), ["a grid", "of two"], "from other prompts"),
    "more prompts": ({}, TextLines(["a"] * 6), ["a grid", "of two"], "from other prompts"),
    "other sample prompts": ({}, PROMPTS, ["a grid"], "another sample_prompts"),
    "another negative prompt": ({"negative_prompt": "blur"}, PROMPTS, ["a grid", "of two"], "another negative_prompt"),
    "another dtype": ({"compute_dtype": "bfloat16"}, PROMPTS, ["a grid", "of two"], "bfloat16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_text_states_of_another_run_are_refused(pipeline, tmp_path, case):
    values, prompts, sample_prompts, words = WRONG[case]
    write_states(pipeline, tmp_path / "states")
    if "compute_dtype" in values:
        pipeline = read_architecture(pipeline.folder, values["compute_dtype"])
    program = make_program(pipeline, MESH, text_states=str(tmp_path / "states"), **values)
    with pytest.raises(UserError, match=words):
        open_states(program, prompts, sample_prompts)


def test_a_file_that_is_not_there_or_no_text_states_is_refused(tmp_path):
    (tmp_path / "text").write_text("a\nb\n")
    for path, words in ((tmp_path / "nowhere", "do not exist"), (tmp_path / "text", "is no file of text states")):
        with pytest.raises(UserError, match=words):
            TextStates(path)
