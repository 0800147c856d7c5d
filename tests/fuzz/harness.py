"""One fuzzing target under atheris: ``python -m tests.fuzz.harness TARGET CORPUS [libFuzzer flags]``."""

import sys
from functools import partial

import atheris

with atheris.instrument_imports(include=["sglang_tpla.transfer"]):
    from sglang_tpla.transfer import messages
    from tests.wire import simulation


def decode_frames(data: bytes) -> None:
    """Any bytes are a message that encodes to itself, or a `FrameError`; sealed, so that the digest stops nothing."""
    for header in (data, messages.seal(data)):
        for has_payload in (False, True):
            try:
                message = messages.decode(header, has_payload)
            except messages.FrameError:
                continue
            again = messages.decode(messages.encode(message), has_payload)
            if again != message:
                raise AssertionError(f"{message} came back as {again}")


TARGETS = {"frames": decode_frames, **{kind.value: partial(simulation.simulate, kind=kind) for kind in simulation.Kind}}

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
