"""A rank of two under Accelerate or Lightning: trains an epoch, writes the rows it was handed."""

import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from latentds import LatentLoader, Order

OPTIONS = {"batch_size": 4, "shuffle": True, "order": Order(last="drop")}


def under_accelerate(folder: str, out: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    network = torch.nn.Linear(3 * 64 * 64, 2)
    loader = LatentLoader(folder, device=accelerator.device, **OPTIONS)
    network, prepared = accelerator.prepare(network, loader)
    assert prepared is loader
    rows = []
    for batch in prepared:
        accelerator.backward(cross_entropy(network(batch.images.flatten(1)), batch.labels))
        rows += batch.rows.tolist()
    (out / f"{accelerator.process_index}.json").write_text(json.dumps(rows))
    accelerator.end_training()


def under_lightning(folder: str, out: Path) -> None:
    import pytorch_lightning

    class Model(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.rows = torch.nn.Linear(3 * 64 * 64, 2), []

        def train_dataloader(self):
            return LatentLoader(folder, **OPTIONS)

        def training_step(self, batch, _):
            self.rows += batch.rows.tolist()
            return cross_entropy(self.network(batch.images.flatten(1)), batch.labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, **quiet
    )
    model = Model()
    trainer.fit(model)
    (out / f"{trainer.global_rank}.json").write_text(json.dumps(model.rows))


if __name__ == "__main__":
    run = under_accelerate if sys.argv[1] == "accelerate" else under_lightning
    run(sys.argv[2], Path(sys.argv[3]))
