"""How training and prediction compute, where that does not change what they compute."""

from __future__ import annotations

from dataclasses import dataclass

from univigu.models.transformer import UniViGUTransformer3DModel


@dataclass
class ComputeOptions:
    """Speed for start-up time, and memory for speed."""

    compile_blocks: bool = False
    """Compile the transformer's repeated block with ``torch.compile``: quicker steps after a start of a minute or so.
    It is compiled once for all layers, and anew for other shapes."""
    compile_backend: str = "inductor"
    """Which of ``torch.compile``'s backends does that."""
    vae_slicing: bool = False
    """Decode a batch's videos one after the other."""
    vae_tiling: bool = False
    """Encode and decode large frames in overlapping tiles that are blended, which differs a little at their seams."""

    def compile(self, model: UniViGUTransformer3DModel) -> None:
        """Compile a model's blocks in place, if asked for; their weights keep their names."""
        if self.compile_blocks:
            for block in model.blocks:  # by hand: diffusers finds them by their class, which sharding changes
                block.compile(backend=self.compile_backend)
