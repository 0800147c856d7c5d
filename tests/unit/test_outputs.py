"""Commands overwrite nothing that they read or did not make, and report at once if a file cannot be made."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_tpla.calibrate.__main__ import main as calibrate
from sglang_tpla.evaluate.__main__ import main as evaluate
from sglang_tpla.evaluate.report import PAGE_HEAD, outputs
from sglang_tpla.measure.outputs import Output, OutputError, check_outputs, is_artifact, is_statistics
from tests.shipped import ARTIFACT, NANO


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder with its contents, and every other entry."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def statistics(path: Path) -> Path:
    """Make a file that looks like statistics."""
    save_file({"x": torch.zeros(1)}, path, metadata={"meta": '{"corpus_hash":"0"}'})
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a checkpoint whose files are links, as in the cache of the Hugging Face hub."""
    folder, blobs = tmp_path / "model", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    for file in NANO.iterdir():
        if file.is_file():
            (blobs / file.name).write_bytes(file.read_bytes())
            (folder / file.name).symlink_to(blobs / file.name)
    return folder


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str | Path], folder: Path) -> str:
    """Run calibrate, which must end with one line and leave the folder as it was."""
    before = tree(folder)
    assert calibrate([*map(str, arguments)]) == 2
    assert tree(folder) == before
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("name", ["model/model.safetensors", "blobs/model.safetensors", "hard", "soft"])
def test_weights_stay(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.link(tmp_path / "blobs" / "model.safetensors", tmp_path / "hard")
    (tmp_path / "soft").symlink_to(model / "model.safetensors")
    said = refused(capsys, ["--model-path", model, "--out", tmp_path / name], tmp_path)
    assert f"--out {tmp_path / name} would replace a file of --model-path; give another path" in said


def test_nothing_is_put_among_the_weights(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "alias").symlink_to(model)
    for folder in (model, tmp_path / "alias"):
        said = refused(capsys, ["--model-path", model, "--out", folder / "a.safetensors"], tmp_path)
        assert "lies in the folder of --model-path" in said


def test_statistics_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sums = statistics(tmp_path / "sums")
    os.link(sums, tmp_path / "hard")
    base = ["--model-path", NANO, "--from-stats", sums, sums]
    for out in (sums, tmp_path / "hard"):
        assert "would replace a file of --from-stats" in refused(capsys, [*base, "--out", out], tmp_path)
    both = [*base, "--out", tmp_path / "a", "--save-stats"]
    assert "would replace a file of --from-stats" in refused(capsys, [*both, sums], tmp_path)
    assert "--save-stats keeps second moments of text" in refused(capsys, [*both, tmp_path / "b"], tmp_path)


def test_two_outputs_are_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--model-path", NANO, "--out", tmp_path / "a", "--save-stats", tmp_path / "x" / ".." / "a"]
    assert "are one file; give each its own" in refused(capsys, out, tmp_path)


@pytest.mark.parametrize("flag", ["--out", "--save-stats"])
def test_what_the_command_did_not_make_stays(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This holds for a device, too, which a finished file would replace."""
    (tmp_path / "text").write_text("print(1)")
    (tmp_path / "note.safetensors").write_bytes(ARTIFACT.read_bytes()[:100])
    save_file({"x": torch.zeros(1)}, tmp_path / "weights", metadata={"format": "pt"})
    os.mkfifo(tmp_path / "pipe")
    kind = "an artifact" if flag == "--out" else "statistics"
    for name in ("text", "note.safetensors", "weights", "pipe"):
        arguments = ["--model-path", NANO, "--out", tmp_path / "a", flag, tmp_path / name]
        said = refused(capsys, arguments, tmp_path)
        assert f"{flag} {tmp_path / name}: what is there is not {kind}; move it away" in said


def test_what_the_command_made_may_be_made_again(tmp_path: Path) -> None:
    (tmp_path / "artifact").write_bytes(ARTIFACT.read_bytes())
    (tmp_path / "empty").touch()
    sums = statistics(tmp_path / "sums")
    before = tree(tmp_path)
    for name in ("artifact", "empty", "new", "deep/er/new"):
        saved = Output("--save-stats", sums, "statistics", is_statistics)
        check_outputs([Output("--out", tmp_path / name, "an artifact", is_artifact), saved], {}, NANO)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("flag", ["--out", "--save-stats"])
@pytest.mark.parametrize(
    ("place", "why"),
    [("/proc/x/y", "No such file or directory"), ("file/x", "exists|Not a directory"), ("a" * 250, "too long")],
)
def test_where_no_file_can_be_made_is_said_at_once(
    flag: str, place: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corpus does not exist either, but that check comes later."""
    (tmp_path / "file").touch()
    base = ["--model-path", NANO, "--out", tmp_path / "a", "--corpus", "/nonexistent"]
    said = refused(capsys, [*base, flag, tmp_path / place], tmp_path)
    assert f"{flag} {tmp_path / place}: no file can be made there (" in said
    assert any(reason in said for reason in why.split("|"))


def test_results_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model-path", str(NANO), "--artifact", str(ARTIFACT), "--out"]
    assert evaluate([*base, "/proc/x"]) == 2
    assert "--out /proc/x/evaluation.json: no file can be made there" in capsys.readouterr().err
    (tmp_path / "evaluation.html").write_text("<!doctype html><title>mine</title>")
    assert evaluate([*base, str(tmp_path)]) == 2
    assert "is not an earlier result of this command" in capsys.readouterr().err
    (tmp_path / "evaluation.html").write_text(f"{PAGE_HEAD}TPLA against plain MLA: x")
    assert evaluate([*base, str(tmp_path), "--corpus", str(tmp_path)]) == 2
    assert "would replace a file of --corpus" in capsys.readouterr().err
    (tmp_path / "endpoints.json").write_text("[]")
    assert evaluate(["--stock-url", "http://a", "--tpla-url", "http://b", "--out", str(tmp_path)]) == 2
    assert "endpoints.json: what is there is not an earlier result" in capsys.readouterr().err
    with pytest.raises(OutputError):
        check_outputs(outputs(tmp_path, live=True), {})
    check_outputs(outputs(tmp_path, live=False), {})
