"""Examples answer a user's mistake with one line that says what was expected. tests/e2e/test_trio.py runs them."""

import runpy
import subprocess
import sys

import pytest

from tests.ports import free_ports
from tests.stub_server import answering


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("example", "url"),
    [
        ("openai_client.py", "http://127.0.0.1:{port}"),
        ("openai_client.py", "nonsense"),
        ("frontend_language.py", "http://127.0.0.1:{port}"),  # it imports SGLang
        pytest.param("frontend_language.py", "nonsense", marks=pytest.mark.slow),
    ],
)
def test_no_deployment_is_one_clear_error(example: str, url: str) -> None:
    url = url.format(port=free_ports(1)[0])
    done = run(f"examples/{example}", "--url", url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: expected a deployment at {url}; ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("model", [200, 503])
def test_a_refused_program_is_one_clear_error(model: int) -> None:
    """As a decode server refuses it, which was asked without the router."""

    def answer(path: str, body: bytes) -> tuple[int, bytes]:
        return (model, b'{"model_path": "m"}') if path == "/get_model_info" else (400, b'{"message": "no room"}')

    with answering(answer) as server:
        done = run("examples/frontend_language.py", "--url", f"http://{server}")
    said = "an answer from" if model == 200 else "a deployment at"
    assert done.returncode == 1 and done.stderr.startswith(f"error: expected {said} http://{server}; {{'m"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and ("no room" in done.stderr) == (model == 200)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--groups", "3"], "--groups must divide the latent's 512 columns; got 3"),
        (["--groups", "0"], "--groups must divide the latent's 512 columns; got 0"),
        (["--tokens", "100"], "--tokens must be a multiple of 64; got 100"),
        (["--tokens", "-64"], "--tokens must be a multiple of 64; got -64"),
    ],
)
def test_sizes_of_two_agents(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["two_agents.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path("examples/two_agents.py", run_name="__main__")
    assert end.value.code == 2 and said in capsys.readouterr().err
