"""The launcher's command line: precedence, refusals, and dry runs that a shell can execute."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_tpla.config import ConfigError, Settings
from sglang_tpla.launch import cpu
from sglang_tpla.launch import options as launch_options
from sglang_tpla.launch.options_file import SETTING_FIELDS
from sglang_tpla.launch.roles import Process, check_free, check_installation, check_log_dir, plan
from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
NANO = "examples/nano-mla"
HANGS_S = 300  # importing SGLang takes seconds on an idle machine, and minutes on a busy one
ARTIFACT = "examples/artifacts/nano-mla-g2.safetensors"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "OMP_", "CUDA_VISIBLE"))}
DECODE = ["--role", "decode", "--model-path", NANO, "--tp", "2", "--tpla-groups", "2", "--tpla-artifact", ARTIFACT]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def launch(*tokens: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real command."""
    return subprocess.run(
        [sys.executable, "-m", "sglang_tpla.launch", *tokens],
        capture_output=True,
        text=True,
        env={**CLEAN, **(environ or {})},
        cwd=ROOT,
        timeout=HANGS_S,
    )


def planned(*tokens: str, environ: dict[str, str] | None = None) -> list[Process]:
    return plan(launch_options.read(tokens, {**CLEAN, **(environ or {})}))


def flags(process: Process) -> dict[str, list[str]]:
    """Return every flag of a command with its values."""
    result: dict[str, list[str]] = {}
    name = ""
    for token in process.command[3:]:
        if token.startswith("--"):
            name = token
            result[name] = []
        else:
            result[name].append(token)
    return result


def write(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_prefill_needs_no_artifact_and_passes_the_rest_through() -> None:
    odd = ["--json-model-override-args", '{"a": "b c"}', "--no-such-flag-today", "x", "--enable-metrics"]
    (process,) = planned("--role", "prefill", "--model-path", NANO, *odd)
    assert process.command[1:3] == ("-m", "sglang.launch_server")
    assert list(process.command[5 : 5 + len(odd)]) == odd
    assert flags(process)["--disaggregation-mode"] == ["prefill"]
    assert flags(process)["--disaggregation-transfer-backend"] == ["tpla"]
    given = {name: value for name, value in process.environment.items() if value is not None}
    assert Settings.from_environment(given) == Settings(role="prefill")


def test_settings_reach_the_processes() -> None:
    (process,) = planned(*DECODE, "--tpla-chunk-bytes", "65536", "--tpla-heartbeat-s", "0.5")
    given = {name: value for name, value in process.environment.items() if value is not None}
    assert Settings.from_environment(given) == Settings(
        role="decode", groups=2, artifact=ARTIFACT, chunk_bytes=65536, heartbeat_s=0.5
    )


def test_command_line_over_file_over_environment_over_default(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", {"tpla_heartbeat_s": 2, "tpla-peer-timeout-s": 20, "tp_size": 4})
    environ = {
        "SGLANG_TPLA_HEARTBEAT_S": "3",
        "SGLANG_TPLA_PEER_TIMEOUT_S": "30",
        "SGLANG_TPLA_TRANSFER_TIMEOUT_S": "33",
    }
    (process,) = planned(*DECODE, "--config", file, "--tpla-heartbeat-s", "1.5", environ=environ)
    settings = Settings.from_environment({k: v for k, v in process.environment.items() if v is not None})
    assert settings is not None
    assert (settings.heartbeat_s, settings.peer_timeout_s, settings.transfer_timeout_s) == (1.5, 20.0, 33.0)
    assert settings.staging_bytes == Settings(role="decode").staging_bytes
    assert flags(process)["--tp"] == ["2"]
    assert "--tp-size" not in flags(process)


def test_the_role_may_come_from_the_file_or_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", {"role": "prefill", "model-path": NANO})
    assert planned("--config", file)[0].role == "prefill"
    assert planned("--model-path", NANO, environ={"SGLANG_TPLA_ROLE": "prefill"})[0].role == "prefill"
    assert planned("--config", file, *DECODE)[0].role == "decode"


def test_file_environment_gives_way_to_the_shell(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.yaml",
        {"environment": {"A": 1, "B": 2, "C": 3}, "prefill": {"environment": {"B": 4}}, "model-path": NANO},
    )
    (process,) = planned("--role", "prefill", "--config", file, environ={"A": "shell"})
    assert {name: process.environment.get(name) for name in "ABC"} == {"A": None, "B": "4", "C": "3"}
    assert process.full_environment({"A": "shell"})["A"] == "shell"


def test_one_file_serves_every_role(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.yaml",
        {
            "model-path": NANO,
            "port": 4000,
            "log-level": "warning",
            "prefill": {"tp-size": 1},
            "decode": {"tp-size": 2, "tpla-groups": 2, "tpla-artifact": ARTIFACT, "port": 5000},
            "router": {"policy": "random"},
        },
    )
    prefill, decode, router = planned("--role", "all", "--config", file)
    assert (prefill.url, decode.url, router.url) == (
        "http://127.0.0.1:4001",
        "http://127.0.0.1:5000",
        "http://127.0.0.1:4000",
    )
    assert flags(router)["--prefill"] == ["http://127.0.0.1:4001", "4003"]
    assert flags(prefill)["--disaggregation-bootstrap-port"] == ["4003"]
    assert flags(router)["--decode"] == ["http://127.0.0.1:5000"]
    assert flags(router)["--policy"] == ["random"]
    assert flags(prefill)["--log-level"] == ["warning"]
    assert "--log-level" not in flags(router)
    assert planned("--role", "decode", "--config", file)[0].url == "http://127.0.0.1:5000"


def test_settings_of_a_trio_reach_the_decode_server_alone() -> None:
    environ = {
        "SGLANG_TPLA_HEARTBEAT_S": "2",
        "SGLANG_TPLA_GROUPS": "4",
        "SGLANG_TPLA_ARTIFACT": "elsewhere",
        "SGLANG_TPLA_STATISTICS_FOLDER": "sums",
    }
    prefill, decode, _ = planned(
        *("--role", "all", "--model-path", NANO, "--decode.tp", "2", "--tpla-groups", "2"),
        *("--decode.tpla-artifact", ARTIFACT, "--prefill.port", "7", "--host", "0.0.0.0"),
        environ=environ,
    )
    first = Settings.from_environment(prefill.full_environment(environ))
    second = Settings.from_environment(decode.full_environment(environ))
    assert first == Settings(role="prefill", heartbeat_s=2, statistics_folder="sums")
    assert second == Settings(role="decode", groups=2, artifact=ARTIFACT, heartbeat_s=2)
    assert prefill.url == "http://127.0.0.1:7"
    assert "--tp" not in flags(prefill)


def test_cpu_servers_get_their_platform() -> None:
    (process,) = planned(*DECODE, "--device", "cpu")
    assert process.environment["SGLANG_PLATFORM"] == "sglang_tpla_cpu"
    assert process.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert str(process.environment["SGLANG_CPU_OMP_THREADS_BIND"]).count("|") == 1
    (process,) = planned(*DECODE, "--device", "cuda")
    assert "SGLANG_PLATFORM" not in process.environment


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--model-path", NANO], "--role must be one of prefill, decode, router, all; got nothing"),
        (["--role", "prefill"], "a prefill server needs --model-path"),
        (["--role", "prefill", "--model-path", NANO, "--tpla-groups", "2"], "stock MLA and takes neither"),
        (DECODE[:-2], "--tpla-groups 2 needs --tpla-artifact; make one with `python -m sglang_tpla.calibrate"),
        ([*DECODE[:-1], "none.safetensors"], "no such file; make one with `python -m sglang_tpla.calibrate"),
        ([*DECODE, "--tpla-groups", "3"], "must divide the attention tensor-parallel size: got groups=3"),
        ([*DECODE, "--tp-size", "48", "--tpla-groups", "2"], "8 query heads cannot be split over 24"),
        ([*DECODE, "--enable-dp-attention", "--dp-size", "2"], "got groups=2 with tp_size=1"),
        ([*DECODE, "--attn-dp-size", "2"], "got groups=2 with tp_size=1"),
        ([*DECODE, "--tpla-groups", "two"], "--tpla-groups must be of type int; got 'two'"),
        ([*DECODE, "--tpla-gruops", "2"], "there is no --tpla-gruops; did you mean --tpla-groups?"),
        (
            [*DECODE, "--prefil.port", "1"],
            "there is no --prefil.port; did you mean --prefill.port? The flags of one role",
        ),
        (["--role", "all", "--model-path", NANO, "--decoder.tp=2"], "no --decoder.tp; did you mean --decode.tp?"),
        ([*DECODE, "--x.port", "1"], "there is no --x.port. The flags of one role are --prefill.FLAG, --decode.FLAG"),
        ([*DECODE, "--tpla-chunk-bytes", "1"], "--tpla-chunk-bytes must lie between 4096 and --tpla-staging-bytes"),
        ([*DECODE, "--startup-timeout-s", "0"], "--startup-timeout-s must be positive and finite; got 0"),
        ([*DECODE, "--startup-timeout-s", "nan"], "--startup-timeout-s must be positive and finite; got nan"),
        ([*DECODE, "--disaggregation-mode", "prefill"], "--role decode means --disaggregation-mode decode"),
        ([*DECODE, "--disaggregation-transfer-backend=nixl"], "means --disaggregation-transfer-backend tpla"),
        ([*DECODE, "other.safetensors"], "--tpla-artifact takes one value; got 2"),
        ([*DECODE, "--decode.tpla-groups", "1", "2"], "--tpla-groups takes one value; got 2"),
        ([*DECODE, "--host", "127.0.0.1", "10.0.0.1"], "--host takes one value; got 2"),
        (["--role", "decode", "--model-path="], "a decode server needs --model-path MODEL"),
        (["--role", "all", "--model-path", NANO, "--log-dir"], "--log-dir needs one value of type str; got None"),
        (["--role", "router", "--decode", "http://a"], "the router needs --prefill URL BOOTSTRAP_PORT"),
        (["--role", "router", "--prefill", "http://a", "1"], "the router needs --decode URL"),
        (["--role", "router", "--tpla-groups", "2"], "the router has no settings of its own"),
        (["--config", "none.yaml"], "--config none.yaml: cannot be read: No such file"),
        ([*DECODE[:-1], "examples"], "--tpla-artifact examples: expected a file; got a folder"),
        ([*DECODE, "--decode.", "x"], "--decode.: expected a flag's name after decode, as in --decode.tp-size; got ''"),
        ([*DECODE, "--decode.=x"], "--decode.: expected a flag's name after decode"),
        ([*DECODE, "--decode.decode.tp-size", "1"], "decode.tp-size stands inside decode"),
        ([*DECODE, "--prefill.config", "c.yaml"], "config is the launcher's own and is given once, outside prefill"),
        ([*DECODE, "--"], "expected a flag's name after the dashes, such as --role; got '--'"),
        ([*DECODE, "--chat-template", "a\0b"], "--chat-template: expected text without NUL bytes"),
        ([*DECODE, "--chat-template", "a\ud800"], "--chat-template: expected text without NUL bytes and half char"),
    ],
)
def test_refusals(tokens: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(*tokens)
    assert message in str(caught.value)


def test_a_model_of_no_number_of_heads(tmp_path: Path) -> None:
    for heads in ("x", 0, [8], 1e400):
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
        with pytest.raises(ConfigError, match="expected num_attention_heads to be a whole number"):
            planned(*DECODE, "--model-path", str(tmp_path))


def test_logs_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/inside"):
        with pytest.raises(ConfigError, match=r"--log-dir .*: expected a folder, or a place to make one"):
            check_log_dir(str(tmp_path / place))
    check_log_dir(None)
    check_log_dir(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "expected YAML"),
        ("- a", "expected a mapping of flags at the top; got list"),
        ("7: 8", "expected flag names as keys, such as tp-size; got 7"),
        ("environment: [A]", "environment must be a mapping"),
        ("tpla-group: 2", "there is no --tpla-group; did you mean --tpla-groups?"),
        ("decode: {tpla_artefact: f}", "there is no --tpla-artefact; did you mean --tpla-artifact?"),
        ("{role: decode, model-path: m, tpla-groups: [2]}", "tpla-groups in FILE needs one value of type int"),
        ("{role: decode, model-path: m, tpla-groups: x}", "tpla-groups in FILE must be of type int; got 'x'"),
        ("x: &a [*a]", "--config FILE: x: expected a value; got one that contains itself"),
        ("x: &a {b: {c: *a}}", "FILE: x: expected a value; got one that contains itself"),
        pytest.param("x: " + "[" * 3000, "FILE: expected flags by name; got values nested too deeply", id="nested"),
        ("x: !!timestamp y", "FILE: expected YAML"),
        ("x: !!binary YQ==", "FILE: x: expected text, a number, a list or a mapping; got a bytes"),
        ('x: "a\\0b"', "FILE: x: expected text without NUL bytes and half characters; got 'a\\x00b'"),
        ('decode: {y: [{z: "\\ud800"}]}', "FILE: decode: expected text without NUL bytes and half characters"),
        ('environment: {"A=B": 1}', "environment: expected a variable's name, such as NCCL_DEBUG; got 'A=B'"),
        ('environment: {"A;rm": x}', "environment: expected a variable's name, such as NCCL_DEBUG; got 'A;rm'"),
        ('prefill: {environment: {"": 2}}', "environment: expected a variable's name, such as NCCL_DEBUG; got ''"),
        ("environment: {A: {b: 1}}", "environment: A needs one value (\"\" for an empty one); got {'b': 1}"),
        ("prefil: {port: 1}", "there is no section prefil; did you mean prefill:? The sections are prefill, decode"),
        ("enviroment: {A: 1}", "there is no section enviroment; did you mean environment:?"),
        (
            "environment: {SGLANG_TPLA_CHACHE: x}",
            "FILE: environment: there is no SGLANG_TPLA_CHACHE; did you mean SGLANG_TPLA_CACHE? Unset it",
        ),
        (
            "decode: {environment: {SGLANG_TPLA_GROUPS: 2}}",
            "SGLANG_TPLA_GROUPS is a setting; give it as a key of the file, tpla-groups",
        ),
        ("environment: {SGLANG_TPLA_ROLE: all}", "SGLANG_TPLA_ROLE is a setting; give it as a key of the file, role"),
        ("environment: {SGLANG_TPLA_SERVER: a}", "SGLANG_TPLA_SERVER is named by each server for its own processes"),
        ("environment: {A: }", 'environment: A needs one value ("" for an empty one); got None'),
        ("prefill: {decode: {tp-size: 1}}", "decode stands inside prefill; sections hold flags, not other sections"),
        ("router: {decode: {tp-size: 1}}", "decode stands inside router; sections hold flags, not other sections"),
        ("decode: {role: prefill}", "role is the launcher's own and is given once, outside decode"),
        ("config: other.yaml", "config is of the command line alone; give --config there"),
        ("decode: {config: other.yaml}", "config is the launcher's own and is given once, outside decode"),
        ("dry_run: maybe", "dry_run is of the command line alone; give --dry-run there"),
        ("{model-path: a, model_path: b}", "model-path and model_path are one flag; give it once"),
        ("decode: {tp: 1, tp-size: 2}", "tp and tp-size are one flag; give it once"),
        ("{port: 1, port: 2}", "the key 'port' stands twice in one mapping"),
        ("x: {y: {z: 1, z: 2}}", "the key 'z' stands twice in one mapping"),
        ("--tp: 2", "expected flag names as keys, such as tp-size; got '--tp'"),
        ("tp=3: 2", "expected flag names as keys, such as tp-size; got 'tp=3'"),
        ("{role: prefill, model-path: m, x: --log-level}", "FILE: x: expected a value; '--log-level' would be read as"),
        ("{role: all, model-path: m, log-dir: [a]}", "log-dir in FILE needs one value of type str"),
        ("{role: all, model-path: m, startup-timeout-s: -1}", "startup-timeout-s in FILE must be positive and finite"),
        (
            "{role: all, model-path: m, startup-timeout-s: null}",
            "startup-timeout-s in FILE needs one value of type float",
        ),
        ("{role: boss}", "--role must be one of prefill, decode, router, all; got 'boss'"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        planned("--config", str(file))
    assert message.replace("FILE", str(file)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("role", ["decode", "all"])
def test_retired_rows_are_refused_wherever_they_are_named(role: str, tmp_path: Path) -> None:
    """The message says where the rows were named, and what to give instead."""
    path = tmp_path / "settings.yaml"
    path.write_text("decode:\n  tpla-rows: fp8\n")
    for origin, tokens, environ in (
        ("--tpla-rows", ("--tpla-rows", "fp8"), {}),
        ("--decode.tpla-rows", ("--decode.tpla-rows", "fp8"), {}),
        (f"tpla-rows in {path}", ("--config", str(path)), {}),
        ("SGLANG_TPLA_ROWS", (), {"SGLANG_TPLA_ROWS": "fp8"}),
    ):
        with pytest.raises(ConfigError) as refusal:
            planned("--role", role, "--model-path", NANO, *tokens, environ=environ)
        assert str(refusal.value).startswith(f"{origin} fp8 asks for FP8 rows, which were retired")
        assert str(refusal.value).endswith("use --tpla-rows sketched")


def test_what_a_file_may_hold(tmp_path: Path) -> None:
    """These are merged mappings, the router's lists beside sections, dates as written, and any scalar variables."""
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model-path: {NANO}\nserved-model-name: 2026-01-01\n"
        "prefill: &p {page-size: 1, log-level: info}\ndecode: {<<: *p, page-size: 2}\n"
        "router: {prefill: [[http://a:1, 2]], decode: [http://b:3]}\nenvironment: {A: 1, B: '', _c: x y}\n"
    )
    (decode,) = planned("--config", str(file), "--role", "decode")
    assert flags(decode)["--page-size"] == ["2"] and flags(decode)["--log-level"] == ["info"]
    assert flags(decode)["--served-model-name"] == ["2026-01-01"]
    assert {name: decode.environment[name] for name in ("A", "B", "_c")} == {"A": "1", "B": "", "_c": "x y"}
    assert flags(planned("--config", str(file), "--role", "router")[0])["--prefill"] == ["http://a:1", "2"]


def test_numbers_of_a_file_are_passed_on_as_they_were_written(tmp_path: Path) -> None:
    """YAML reads 0612345 as 202,981, 10:30 as 630, 1.10 as 1.1 and off as False; inside JSON a number is a number."""
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model-path: {NANO}\nrevision: 0612345\napi-key: 1.10\ndist-init-addr: 10:30\nport: 03_000\n"
        "served-model-name: [1_0, 1e3]\njson-model-override-args: {a: 1, b: 0.50}\ndisable-radix-cache: &same yes\n"
        "environment: {A: 007, B: 1.0, C: true, D: off, E: *same}\ntpla-heartbeat-s: 0.50\ntp-size: 2\n"
    )
    (decode,) = planned("--config", str(file), "--role", "decode")
    found = flags(decode)
    assert {name: found[f"--{name}"] for name in ("revision", "api-key", "dist-init-addr", "port")} == {
        "revision": ["0612345"], "api-key": ["1.10"], "dist-init-addr": ["10:30"], "port": ["03_000"]
    }  # fmt: skip
    assert found["--served-model-name"] == ["1_0", "1e3"] and found["--tp-size"] == ["2"]
    assert json.loads(found["--json-model-override-args"][0]) == {"a": 1, "b": 0.5}
    assert found["--disable-radix-cache"] == []
    variables = {"A": "007", "B": "1.0", "C": "true", "D": "off", "E": "yes"}
    assert {name: decode.environment[name] for name in variables} == variables
    assert float(decode.environment["SGLANG_TPLA_HEARTBEAT_S"] or 0) == 0.5


def test_the_hint_for_a_missing_artifact_is_the_documented_command() -> None:
    with pytest.raises(ConfigError) as caught:
        planned(*DECODE[:-1], "none.safetensors")
    assert f"calibrate --model-path {NANO} --groups 2 --out none.safetensors`" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "environ", "said"),
    [
        (["--tpla-groups", "3"], {}, "--tpla-groups must divide"),
        (
            ["--dry-run"],
            {"SGLANG_TPLA_HEARTBEATS": "2"},
            "environment: there is no SGLANG_TPLA_HEARTBEATS; did you mean SGLANG_TPLA_HEARTBEAT_S?",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(more: list[str], environ: dict[str, str], said: str) -> None:
    done = launch(*DECODE, *more, environ=environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"sglang_tpla.launch: error: {said}")
    assert done.stderr.count("\n") == 1


def test_nothing_is_compiled_while_a_request_waits() -> None:
    """With a CPU server's environment a process never calls the compiler; without that environment it does."""
    program = (
        "import torch\n"
        "asked = []\n"
        "def compiler(graph, inputs):\n"
        "    asked.append(graph)\n"
        "    return graph\n"
        "assert torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(2)).sum() == 4\n"
        "print(len(asked))"
    )
    for environment, compiled in ((cpu.environment(1, {}), "0"), ({"TORCHDYNAMO_DISABLE": "0"}, "1")):
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert done.stdout.strip() == compiled, done.stderr
    assert "TORCHDYNAMO_DISABLE" not in cpu.environment(1, {"TORCHDYNAMO_DISABLE": "0"})


def test_help_lists_every_setting() -> None:
    done = launch("--help")
    assert done.returncode == 0
    for flag in SETTING_FIELDS:
        assert f"--{flag} " in done.stdout


def test_a_dry_run_is_what_a_shell_can_execute(tmp_path: Path) -> None:
    """The printed text, run by a shell with a stand-in for the interpreter, gives the planned process."""
    tokens = [*DECODE, "--device", "cpu", "--json-model-override-args", '{"a": "it\'s $HOME"}']
    environ = {"SGLANG_TPLA_GROUPS": "1", "OMP_NUM_THREADS": "1"}
    done = launch(*tokens, "--dry-run", environ=environ)
    assert done.returncode == 0, done.stderr
    (process,) = planned(*tokens, environ=environ)
    show = tmp_path / "show"
    show.write_text(f"#!{sys.executable}\nimport os, sys, json\njson.dump([sys.argv, dict(os.environ)], sys.stdout)\n")
    show.chmod(0o755)
    text = done.stdout.replace(f"{sys.executable} -m sglang.launch_server", shlex.quote(str(show)))
    shell = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, env={**CLEAN, **environ}, timeout=HANGS_S
    )
    assert shell.returncode == 0, shell.stderr
    argv, seen = yaml.safe_load(shell.stdout)
    assert argv[1:] == list(process.command[3:])
    expected = process.full_environment({**CLEAN, **environ})
    chosen = {name for name in {**expected, **seen} if name.startswith(("SGLANG_", "OMP_", "CUDA_", "TORCH"))}
    assert {name: seen.get(name) for name in chosen} == {name: expected.get(name) for name in chosen}


def test_a_single_role_becomes_the_server(tmp_path: Path) -> None:
    """The launcher executes the server in its own process: SGLang itself answers, with its own exit code."""
    done = launch("--role", "router", "--prefill", "http://a", "1", "--decode", "http://b", "--no-such-flag")
    assert done.returncode == 2
    assert "unrecognized arguments: --no-such-flag" in done.stderr


def test_an_interpreter_without_the_plugin_is_refused() -> None:
    with pytest.raises(ConfigError, match="SGLANG_PLUGINS=other keeps SGLang from loading sglang_tpla"):
        check_installation({"SGLANG_PLUGINS": "other"})
    check_installation({"SGLANG_PLUGINS": "other, sglang_tpla"})


def speculative_flags(process: Process) -> dict[str, str]:
    """Return the values of the speculation flags on a server's command line."""
    return {flag: values[-1] for flag, values in flags(process).items() if flag.startswith("--speculative-")}


def test_speculation_says_what_follows_from_it() -> None:
    chain = {"--speculative-eagle-topk": "1", "--speculative-num-draft-tokens": "3"}
    given = {"--speculative-algorithm": "NEXTN", "--speculative-num-steps": "2"}
    tokens = [token for pair in given.items() for token in pair]
    (decode,) = planned(*DECODE, *tokens)
    assert speculative_flags(decode) == given | chain | {"--speculative-attention-mode": "decode"}
    (prefill,) = planned("--role", "prefill", "--model-path", NANO, *tokens)
    assert speculative_flags(prefill) == given | chain
    (default,) = planned(*DECODE, "--speculative-algorithm", "EAGLE")  # SGLang's own numbers: 3, 1, 4
    assert set(speculative_flags(default)) == {"--speculative-algorithm", "--speculative-attention-mode"}
    (own,) = planned(*DECODE, *tokens, "--speculative-num-draft-tokens", "4", "--speculative-attention-mode", "prefill")
    assert speculative_flags(own)["--speculative-num-draft-tokens"] == "4"
    assert speculative_flags(own)["--speculative-attention-mode"] == "prefill"  # refused at start, with the reason
    whole = ("--speculative-num-steps", "--speculative-num-draft-tokens", "--speculative-eagle-topk")
    for flag, value, expected in ((whole[1], "3", "2 3 1"), (whole[2], "1", "3 4 1"), (whole[0], "1", "1 2 1")):
        (decode,) = planned(*DECODE, "--speculative-algorithm", "EAGLE", flag, value)  # SGLang needs all three
        assert [speculative_flags(decode)[name] for name in whole] == expected.split()
    (plain,) = planned(*DECODE)
    assert not speculative_flags(plain)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_ports_at_which_somebody_listens_are_refused(host: str) -> None:
    """The launcher refuses before anything starts; a server would notice only after loading its weights."""
    trio = ["--role", "all", "--model-path", NANO, "--host", host, "--prefill.host", host]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for flag, role in (("--port", "router"), ("--prefill.port", "prefill"), ("--router.prometheus-port", "router")):
            own = [] if flag == "--port" else ["--port", str(free_ports(1)[0])]
            (process,) = [one for one in planned(*trio, *own, flag, str(port)) if one.role == role]
            name = flag.rpartition(".")[2].removeprefix("--")
            with pytest.raises(ConfigError, match=f"{role}: --{name} {port}: another process listens there already"):
                check_free(process)
    check_free(planned("--role", "prefill", "--model-path", NANO, "--host", host, "--port", str(port))[0])


def test_the_command_refuses_a_port_at_which_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = launch("--role", "prefill", "--model-path", NANO, "--device", "cpu", "--port", str(port))
    assert done.returncode == 2
    assert f"prefill: --port {port}: another process listens there already" in done.stderr
