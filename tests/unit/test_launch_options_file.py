"""Each value of the configuration file arrives as the user would write it in a shell, or is refused."""

import json
from pathlib import Path

import pytest

from sglang_tpla.config import ConfigError
from sglang_tpla.launch.flags import to_tokens
from sglang_tpla.launch.options import Options, read


def options(text: str, folder: Path) -> Options:
    file = folder / "options.yaml"
    file.write_text(text)
    return read(["--role", "all", "--config", str(file)], {})


def in_json(text: str, folder: Path) -> object:
    """Return the value of the only flag, which is JSON."""
    _, value = to_tokens(options(text, folder).engine_arguments("prefill"))
    return json.loads(value)


@pytest.mark.parametrize(
    "text",
    [
        "environment: {A: true, B: off, C: 1.10}",
        "prefill: {json: &j {A: true, B: off, C: 1.10}}\ndecode: {environment: *j}",
        "prefill: {json: &j {A: true, B: on}}\ndecode: {environment: {<<: *j, B: off, C: 1.10}}",
        "prefill: {environment: &e {A: true, B: on}}\ndecode: {environment: {<<: *e, B: off, C: 1.10}}",
        "json: &j {environment: {A: true, B: off, C: 1.10}}\ndecode: {<<: *j}",
    ],
)
def test_a_variable_is_text_by_whatever_way_it_comes(text: str, tmp_path: Path) -> None:
    assert options(text, tmp_path).file_environment("decode") == {"A": "true", "B": "off", "C": "1.10"}


@pytest.mark.parametrize(
    "text",
    [
        "json: {environment: {A: true, B: off}}",
        "json: {x: [{environment: {A: yes, B: false}}]}",
        "environment: &e {A: true, B: off}\njson: *e",
        "json: &e {A: true, B: off}\ndecode: {environment: *e}",
    ],
)
def test_truth_inside_of_json_is_one(text: str, tmp_path: Path) -> None:
    found = json.dumps(in_json(text, tmp_path))
    assert '"A": true, "B": false' in found


@pytest.mark.parametrize("value", ["on", "true", "No", "null", "~"])
@pytest.mark.parametrize(
    "text", ["x: [1, VALUE]", "decode: {x: [[VALUE]]}", "router: {prefill: [[http://a:1, VALUE]]}"]
)
def test_a_list_holds_neither_truth_nor_nothing(text: str, value: str, tmp_path: Path) -> None:
    """YAML reads `on` and `true` alike, and `none` is the router's word for no port."""
    bare, quoted = (options(text.replace("VALUE", word), tmp_path) for word in (value, f'"{value}"'))

    def tokens(loaded: Options) -> list[str]:
        return [token for role in ("decode", "router") for token in to_tokens(loaded.engine_arguments(role))]

    with pytest.raises(ConfigError, match=r"options.yaml: \w+: expected text or numbers in the list; .* in quotes"):
        tokens(bare)
    assert value in tokens(quoted)


@pytest.mark.parametrize("number", ["1e6", "-2.5E+3", "1e-6", ".5e1", "1.e0"])
def test_a_number_with_an_exponent_is_one_inside_of_json(number: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e6 as text, which would become a rope_theta of '1e6'."""
    assert in_json(f"json: {{a: {number}, b: '1e6', c: 1e6x}}", tmp_path) == {
        "a": float(number), "b": "1e6", "c": "1e6x"
    }  # fmt: skip
    loaded = options(f"x: {number}\nenvironment: {{A: {number}}}", tmp_path)
    assert to_tokens(loaded.engine_arguments("decode")) == ["--x", number]
    assert loaded.file_environment("decode") == {"A": number}
