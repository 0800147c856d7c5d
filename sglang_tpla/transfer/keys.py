"""Make keys: ``python -m sglang_tpla.transfer.keys FOLDER [--decode NAME ...]``.

Writes ``prefill.secret``, ``prefill.public``, ``decode.secret``, ``decode.public`` and the allow-list
``allowed``. Prefill machines need ``prefill.secret`` and ``allowed``, decode machines ``decode.secret`` and
``prefill.public``. ``--decode NAME`` adds a key pair for one more decode server (``NAME.secret``, to be
installed there as ``decode.secret``) and allows it. Keys that exist are kept.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import zmq

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def make_pair(folder: Path, name: str) -> tuple[str, bool]:
    """Return the public key of ``name``, made with its secret unless both exist; and whether it was made."""
    secret_path, public_path = folder / f"{name}.secret", folder / f"{name}.public"
    if secret_path.exists() and public_path.exists():
        text = public_path.read_text().strip()
        if len(text) != 40:
            raise OSError(f"expected a public key of 40 characters in {public_path}, found {text[:50]!r}")
        return text, False
    for one, other in ((secret_path, public_path), (public_path, secret_path)):
        if one.exists():  # a server's folder, to which the other half was not copied
            raise OSError(f"expected {other.name} beside {one.name}, found none: make keys where both halves are")
    public, secret = zmq.curve_keypair()
    descriptor = os.open(secret_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret.decode() + "\n")
    public_path.write_text(public.decode() + "\n")
    return public.decode(), True


def _name(text: str) -> str:
    if not NAME.fullmatch(text) or text in ("prefill", "allowed"):
        raise argparse.ArgumentTypeError(f"expected the name of a decode server, which becomes a file's; got {text!r}")
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return 0 on success or 2 where the folder cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m sglang_tpla.transfer.keys", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--decode", nargs="+", default=[], type=_name, metavar="NAME", help="further decode servers")
    args = parser.parse_args(arguments)
    try:
        make(args.folder, args.decode)
    except (OSError, UnicodeDecodeError) as error:
        print(f"sglang_tpla.transfer.keys: error: {args.folder}: {error}", file=sys.stderr)
        return 2
    print(f"start the servers with --tpla-keys {args.folder}")
    return 0


def make(folder: Path, others: list[str]) -> None:
    """Make the keys that are missing in a folder, and allow those of decode servers."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    allowed = folder / "allowed"
    listed = allowed.read_text() if allowed.exists() else "# public keys of decode servers, one a line\n"
    for name in ("prefill", "decode", *others):
        public, made = make_pair(folder, name)
        print(f"{name}: {public} ({'made' if made else 'kept'})")
        if name != "prefill" and public not in listed:
            end = "" if listed.endswith("\n") or not listed else "\n"  # of a line that was written by hand
            listed += f"{end}{public} {name}\n"
    allowed.write_text(listed)


if __name__ == "__main__":
    sys.exit(main())
