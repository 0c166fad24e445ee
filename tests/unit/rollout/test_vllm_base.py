"""The dequantised base that is written for servers, on a disk that gets full."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from grpo_dist.config.schema import Config, ModelConfig, RolloutConfig, TrainConfig
from grpo_dist.config.vllm import VllmConfig
from grpo_dist.model.config_files import load_model_config
from grpo_dist.rollout.vllm.base import served_model, write_base_of


@pytest.mark.parametrize(
    ("size", "reason"),
    [("100k", "0.00 GiB are free"), ("1912k", "No space left on device"), ("1920k", "No space left on device")],
)
def test_a_full_disk(size: str, reason: str, tmp_path: Path) -> None:
    """Before anything is written, and in the middle of it. Nothing is left, and the next attempt succeeds."""
    pytest.importorskip("bitsandbytes")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    servers = VllmConfig(urls=["http://localhost:8000"])
    config = Config(model=ModelConfig(quantization="nf4", dtype="float32"), train=TrainConfig(output_dir=str(disk)),
                    rollout=RolloutConfig(engine="vllm", vllm=servers))  # fmt: skip
    model_config = load_model_config(config.model)
    try:
        with pytest.raises(OSError, match=f"rollout.vllm: the dequantised base cannot be written to .*{reason}.*free"):
            write_base_of(config, model_config)
        assert not list(disk.iterdir()) and shutil.disk_usage(disk).used == 0
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        write_base_of(config, model_config)
        assert (Path(served_model(config, model_config)) / "model.safetensors").stat().st_size > 1.9e6
    finally:
        subprocess.run(["umount", disk], check=True)
