"""Certificates for a test, made by the openssl program."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Signed:
    """A certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """A certificate authority that nobody knows but the test."""

    def __init__(self, folder: Path, name: str = "authority"):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.cert, self._key = folder / "ca.pem", folder / "ca.key"
        _openssl(
            "req", "-x509", *NEW_KEY, "-keyout", self._key, "-out", self.cert, "-days", "2", "-subj", f"/CN={name}"
        )

    def sign(self, name: str, *, alternatives: str = "IP:127.0.0.1,DNS:localhost") -> Signed:
        """A certificate for `name`, good for the addresses of `alternatives`."""
        signed = Signed(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        _openssl(
            *("req", "-x509", *NEW_KEY, "-CA", self.cert, "-CAkey", self._key, "-days", "2"),
            *("-keyout", signed.key, "-out", signed.cert, "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName={alternatives}", "-addext", "basicConstraints=critical,CA:FALSE"),
        )
        return signed

    def encrypted(self, signed: Signed) -> Path:
        """Its key behind a password."""
        path = signed.key.with_suffix(".encrypted")
        _openssl("pkcs8", "-topk8", "-in", signed.key, "-out", path, "-passout", "pass:swordfish")
        return path


def _openssl(*arguments: object) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
