"""A page for trying a student in the browser, beside its teacher: python launch/demo.py --model=PLACE --teacher=PLACE.

Without --model the page has the shipped emoji student and its teacher. docs/demo.md says more.
"""

import importlib
import os
import socket
from typing import Any

import jax.numpy as jnp
from absl import flags

from mlcm_jax import model_flags
from mlcm_jax.cli import run_main
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.errors import UserError
from mlcm_jax.hub.controlnet import load_controlnet
from mlcm_jax.hub.lora import parse_lora
from mlcm_jax.hub.network import Network
from mlcm_jax.hub.pipeline import Pipeline, load_pipeline, read_architecture
from mlcm_jax.model_flags import (
    ARCHITECTURE,
    EMOJI,
    MODEL,
    REVISION,
    VARIANT,
    allow_shipped_model,
    chosen_loras,
    load_model,
    named_model,
)
from mlcm_jax.sampling.page import answers
from mlcm_jax.sampling.side_by_side import SideBySide, TimedSampler, check_shared_noise
from mlcm_jax.sampling.text_to_image import TextToImage

flags.adopt_module_key_flags(model_flags)
LORA = flags.DEFINE_multi_string("lora", None, "LoRA that makes the student of the model, PLACE or PLACE:SCALE.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Default: 1 (none) for distilled models, 5 for others.")
TEACHER = flags.DEFINE_string("teacher", None, "A model to show beside it; off: none, also beside the shipped student.")
TEACHER_STEPS = flags.DEFINE_integer("teacher_steps", 25, "Its sampling steps.")
TEACHER_GUIDANCE_SCALE = flags.DEFINE_float(
    "teacher_guidance_scale", None, "Default: 1.5 for the shipped teacher; 1 (none) for distilled models, 5 for others."
)
CONTROLNET = flags.DEFINE_string("controlnet", None, "Folder of a ControlNetModel; the page then takes its image.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the UNets' and text encoders' arithmetic.")
PORT = flags.DEFINE_integer("port", 7860, "Of the page's address, on this machine alone.", 1, 65535)
allow_shipped_model()

HOST = "127.0.0.1"
CSS = ".sample img { width: 100%; height: 100%; object-fit: contain; }"  # small images are enlarged
MAX_STEPS = 8
BEST_GUIDANCE_SCALE = 1.5  # the shipped teacher's: examples/emoji/README.md


def check_port(port: int) -> None:
    """Raise UserError for a port that no server can be started at."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just left is free
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port={port} cannot be used ({error.strerror}): name another one.") from None


def asked_teacher() -> str | None:
    """--teacher; the shipped student has its own where none is named."""
    if TEACHER.value is None:
        return None if named_model() else str(EMOJI / "teacher")
    return None if TEACHER.value == "off" else TEACHER.value


def described_models(teacher: str | None) -> list[Pipeline]:
    """The model and the teacher by their config.json files; raises UserError for models that do not fit each other."""
    given = {"architecture": ARCHITECTURE.value, "variant": VARIANT.value, "revision": REVISION.value}
    models = {"model": read_architecture(str(MODEL.value), **given)}
    if teacher:
        models["teacher"] = models["model"] if teacher == MODEL.value else read_architecture(teacher)
        check_shared_noise(models)
        step_table(models["teacher"].scheduler_config, TEACHER_STEPS.value)
    return list(models.values())


def controlnets(models: list[Pipeline]) -> list[Network | None]:
    """The ControlNet of the flags for each model; models of one architecture share it."""
    if CONTROLNET.value is None:
        return [None for _ in models]
    found = []
    for model in models:
        shared = found and model.unet.module == models[0].unet.module
        found.append(found[0] if shared else load_controlnet(CONTROLNET.value, model, dtype=jnp.dtype(DTYPE.value)))
    return found


def load_models(teacher: str | None, networks: list[Network | None]) -> SideBySide:
    """The models of the flags with their ControlNets; a teacher that is the model without its LoRAs is read once."""
    base = load_model(DTYPE.value)
    model = TextToImage(base).with_loras(*chosen_loras(LORA.value))
    student = TimedSampler(model, None, GUIDANCE_SCALE.value, networks[0])
    if teacher is None:
        return SideBySide(student)
    guidance_scale = TEACHER_GUIDANCE_SCALE.value
    if guidance_scale is None and not named_model():
        guidance_scale = BEST_GUIDANCE_SCALE
    other = base if teacher == MODEL.value else load_pipeline(teacher, dtype=jnp.dtype(DTYPE.value))
    return SideBySide(student, TimedSampler(TextToImage(other), TEACHER_STEPS.value, guidance_scale, networks[1]))


def import_gradio() -> Any:
    """The library of the page, told not to report to its makers."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("gradio")
    except ImportError:
        raise UserError("The page needs gradio: make demo, or python -m pip install -e .[demo], installs it.") from None


def page(gr: Any, models: SideBySide) -> Any:
    """gradio's blocks: inputs on the left, the images on the right."""
    teacher = models.teacher
    with gr.Blocks(title="mlcm_jax", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown("## mlcm_jax: " + " + ".join([str(MODEL.value), *chosen_loras(LORA.value)]))
        with gr.Row():
            with gr.Column():
                inputs, steps, button = _inputs(gr, models)
            with gr.Column(scale=2), gr.Row():
                outputs = _output(gr, "Student", "student")
                outputs += _output(gr, f"Teacher, {teacher.num_steps} steps", "teacher") if teacher else []
        answer = answers(models, lambda sentence: gr.Error(sentence, duration=None, print_exception=False))
        gr.on([button.click, inputs[0].submit, steps.release], answer, inputs, outputs, trigger_mode="always_last")
    return blocks


def _output(gr: Any, label: str, elem_id: str) -> list[Any]:
    with gr.Column(min_width=240):
        buttons = ["download", "fullscreen"]  # without "share", which uploads the image
        image = gr.Image(label=label, elem_id=elem_id, elem_classes="sample", format="png", height=360, buttons=buttons)
        return [image, gr.Textbox(label="Time without compilation", interactive=False)]


def _inputs(gr: Any, models: SideBySide) -> tuple[list[Any], Any, Any]:
    """In the order of ``answers``, the slider of steps, and the button."""
    student, multiple = models.student, models.size_multiple
    prompt = gr.Textbox("red heart, noto style" if not named_model() else "", label="Prompt", lines=2)
    guided = student.takes_negative_prompt
    negative = gr.Textbox(
        label="Negative prompt",
        info=None if guided else "This student takes no guidance, so a negative prompt does nothing.",
        interactive=guided,
    )
    steps = gr.Slider(1, MAX_STEPS, 4, step=1, label="Steps of the student", elem_id="steps")
    seed = gr.Number(0, label="Seed", precision=0)
    with gr.Row():
        sides = zip(("Height", "Width"), student.model.pipeline.image_size, strict=True)
        size = [gr.Slider(multiple, 2 * side, side, step=multiple, label=f"{name}, pixels") for name, side in sides]
    lora = gr.Textbox(label="LoRA for the student", placeholder="FILE.safetensors or FILE.safetensors:0.8")
    upload = gr.UploadButton("Upload a LoRA", file_types=[".safetensors"], size="sm")
    upload.upload(lambda file: file, upload, lora)
    inputs = [prompt, negative, steps, seed, *size, lora]
    if student.controlnet:
        inputs.append(gr.Image(type="pil", label="Image for the ControlNet"))
        inputs.append(gr.Slider(0, 2, 1, step=0.05, label="Scale of the ControlNet"))
    button = gr.Button("Make the image", variant="primary")
    gr.Markdown("The first image of a size compiles the programs for it, and takes longer.")
    return inputs, steps, button


def main():
    check_port(PORT.value)
    for entry in chosen_loras(LORA.value):
        parse_lora(entry)
    teacher = asked_teacher()
    networks = controlnets(described_models(teacher))
    gr = import_gradio()
    blocks = page(gr, load_models(teacher, networks))
    blocks.launch(
        server_name=HOST,
        server_port=PORT.value,
        quiet=True,
        share=False,
        ssr_mode=False,
        theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),  # the theme's own fonts are elsewhere
        css=CSS,
        footer_links=[],
        prevent_thread_lock=True,
    )
    print(f"The page is at http://{HOST}:{PORT.value} (Ctrl-C ends it).", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    run_main(main)
