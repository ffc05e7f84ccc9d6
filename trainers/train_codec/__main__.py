"""Train an autoencoder for entropy-coded records: `tiny-v2`, or one from your own tiles.

    python -m latentds_trainers.train_codec --tiles ../shared/assets --out runs/codec
    deepspeed --num_gpus 1 --module latentds_trainers.train_codec --tiles packed.tiles \\
        --preset gpu-10min --out runs/codec

Training uses openly licensed tiles only (`tiles.py`). UCSB, MoNuSeg and the pictures of the
demo stay test sets and are never opened. The loss is mean squared error plus `rate_weight` times
bits a pixel. The same command continues from the newest checkpoint. Every checkpoint also replaces
OUT/codec, which has encoder, decoder, two fast decoders, tables and card, for `--autoencoder
OUT/codec`. Under `deepspeed` or `torchrun`, any number of ranks draws the same crops.
"""

from __future__ import annotations

from latentds_trainers.engine.launching import launch
from latentds_trainers.train_codec.config import TrainCodecConfig

from latentds.core.display import say

USUAL = ("tiles", "preset", "bytes", "channels", "steps")  # options


def main(config: TrainCodecConfig) -> None:
    if config.pack is not None:
        from latentds_trainers.train_codec.tiles import pack_tiles

        pack_tiles(config.tiles, config.pack)
        say(config.pack)
        return
    from latentds_trainers.train_codec.task import CodecTask, StudentTask, train

    task = CodecTask if config.students_of is None else StudentTask
    path = train(task(config.settings))
    if path is not None:
        say(path)


if __name__ == "__main__":
    launch(main, TrainCodecConfig, __doc__, usual=USUAL)
