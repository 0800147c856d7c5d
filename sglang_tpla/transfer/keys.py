"""Make keys: ``python -m sglang_tpla.transfer.keys FOLDER [--decode NAME ...]``.

Writes ``prefill.secret``, ``prefill.public``, ``decode.secret``, ``decode.public`` and the allow-list
``allowed``. Prefill machines need ``prefill.secret`` and ``allowed``, decode machines ``decode.secret`` and
``prefill.public``. ``--decode NAME`` adds a key pair for one more decode server (``NAME.secret``, to be
installed there as ``decode.secret``) and allows it. Keys that exist are kept.
"""

import argparse
import os
from pathlib import Path

import zmq


def make_pair(folder: Path, name: str) -> tuple[str, bool]:
    """Return the public key of ``name``, made with its secret unless both exist; and whether it was made."""
    secret_path, public_path = folder / f"{name}.secret", folder / f"{name}.public"
    if secret_path.exists() and public_path.exists():
        return public_path.read_text().split()[0], False
    public, secret = zmq.curve_keypair()
    descriptor = os.open(secret_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret.decode() + "\n")
    public_path.write_text(public.decode() + "\n")
    return public.decode(), True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sglang_tpla.transfer.keys", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--decode", nargs="+", default=[], metavar="NAME", help="further decode servers")
    args = parser.parse_args(arguments)
    args.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    allowed = args.folder / "allowed"
    listed = allowed.read_text() if allowed.exists() else "# public keys of decode servers, one a line\n"
    for name in ("prefill", "decode", *args.decode):
        public, made = make_pair(args.folder, name)
        print(f"{name}: {public} ({'made' if made else 'kept'})")
        if name != "prefill" and public not in listed:
            listed += f"{public} {name}\n"
    allowed.write_text(listed)
    print(f"start the servers with --tpla-keys {args.folder}")


if __name__ == "__main__":
    main()
