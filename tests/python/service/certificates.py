"""Certificate authorities and server certificates for tests, made by the openssl program."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Authority:
    """A certificate authority: its own certificate, which clients are to trust, and its key."""

    certificate: Path
    key: Path

    def issue(self, folder: Path, name: str, subject: str = "IP:127.0.0.1,DNS:localhost") -> tuple[Path, Path]:
        """A server's certificate and key, for these addresses and names."""
        certificate, key, request = (folder / f"{name}.{ending}" for ending in ("pem", "key", "csr"))
        _openssl("req", "-new", *_new_key(key), "-subj", f"/CN={name}", "-out", request)
        extensions = folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={subject}\nbasicConstraints=CA:FALSE\n")
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key, "-set_serial", "2"),
            *("-days", "2", "-extfile", extensions, "-out", certificate),
        )
        return certificate, key


def make_authority(folder: Path, name: str) -> Authority:
    authority = Authority(folder / f"{name}.pem", folder / f"{name}.key")
    _openssl(
        *("req", "-x509", *_new_key(authority.key), "-subj", f"/CN={name}", "-days", "2"),
        *("-addext", "keyUsage=critical,keyCertSign", "-out", authority.certificate),
    )
    return authority


def _new_key(path: Path) -> tuple[object, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", path)


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)
