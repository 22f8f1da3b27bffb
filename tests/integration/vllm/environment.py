"""Make vLLM's wheel for CPUs importable, in the environment whose interpreter runs this: `make test-vllm` does.

PyPI's torchvision is linked to CUDA and finds no operators beside a CPU build of torch; vLLM needs its transforms
only, and that the schemas of two operators are known.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

MARK = "# schemas for a torch without CUDA"
SCHEMAS = f"""

{MARK}
if not _has_ops():
    _schemas = torch.library.Library("torchvision", "DEF")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    torch = importlib.util.find_spec("torch")
    assert torch is not None, "torch is not installed here"
    assert torch.origin is not None, "torch has no file"
    file = Path(torch.origin).parents[1] / "torchvision" / "extension.py"
    text = file.read_text()
    if MARK not in text:
        file.write_text(text + SCHEMAS)


if __name__ == "__main__":
    main()
