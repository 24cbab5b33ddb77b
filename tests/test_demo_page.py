"""The page of launch/demo.py in a browser: Debian's chromium, driven by playwright (extra demo-test)."""

import io
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")]
SECONDS = 300  # for what compiles, on a busy machine


@pytest.fixture(scope="module")
def address():
    """Of the page with the shipped student and its teacher."""
    pytest.importorskip("gradio", reason="there is no gradio: install the extra demo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "launch/demo.py", f"--port={port}"]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout and server.stderr
    try:
        line = server.stdout.readline()
        assert f"http://127.0.0.1:{port} " in line, line + server.stderr.read()
        yield f"http://127.0.0.1:{port}"
        assert server.poll() is None, "the server goes on after mistakes"
    finally:
        server.terminate()
        _, errors = server.communicate(timeout=60)
    assert "Traceback" not in errors, errors


@pytest.fixture
def browser_page(address):
    api = pytest.importorskip("playwright.sync_api", reason="there is no playwright: install the extra demo-test")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(SECONDS * 1000)
        yield page
        browser.close()


def image_of(page, model, after=None):
    """Pixels and address of a model's image, once the page has another one than that at the address ``after``."""
    shown = f"#{model} img" + (f':not([src="{after}"])' if after else "")
    address = page.locator(shown).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body()))), address


def test_prompt_slider_and_mistake(address, browser_page):
    page, hosts = browser_page, set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(address)
    assert page.get_by_label("Negative prompt").is_disabled()
    page.get_by_label("Prompt", exact=True).fill("grinning face, twemoji style")
    button = page.get_by_role("button", name="Make the image")
    button.click()
    four, at_four = image_of(page, "student")
    teacher, _ = image_of(page, "teacher")
    assert four.shape == teacher.shape == (64, 64, 3) and (four != teacher).any()

    page.locator("#steps input[type=range]").click(position={"x": 1, "y": 5})
    assert page.locator("#steps input[type=number]").input_value() == "1"
    one, at_one = image_of(page, "student", after=at_four)
    assert (one != four).any()
    page.locator("#teacher .empty").wait_for(state="hidden")
    page.locator("#teacher img").wait_for()
    np.testing.assert_array_equal(image_of(page, "teacher")[0], teacher)

    page.get_by_label("LoRA for the student").fill("nowhere.safetensors")
    button.click()
    page.get_by_text("nowhere.safetensors does not exist").wait_for()
    assert "Traceback" not in page.content()

    page.get_by_label("LoRA for the student").fill("")
    page.get_by_label("Seed").fill("7")
    button.click()
    assert (image_of(page, "student", after=at_one)[0] != one).any()
    assert hosts == {"127.0.0.1"}, "the page asks nobody else for anything"
