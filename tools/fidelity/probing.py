"""Classes of reconstructions by linear probes that were fitted to embeddings of originals."""
# n crops, D embedding dimensions

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from latentds_tools.fidelity.fidelity_crops import Crop, FidelityCrops
from latentds_tools.fidelity.measuring import MeasuredOriginals

from latentds.errors import InputError
from latentds.evaluation.probes import load_scikit_learn

MAX_ITERATIONS = 500


class PatchProbe:
    """Whether a probe tells the class of each reconstruction, one probe an embedder and slide left.

    A crop is judged by a probe that saw no crop of its slide.
    training  crops of labelled pictures: the folder that a picture lies in is its class
    crops     the tested ones, of the same slides and classes
    raises    InputError for fewer than two classes or slides, or a tested class not among them
    """

    def __init__(
        self, training: FidelityCrops, crops: Sequence[Crop], embedders: dict[str, Any]
    ) -> None:
        self.training = training.crops
        self.classes = sorted({class_of(crop) for crop in self.training})
        slides = {crop.slide for crop in self.training}
        unknown = {class_of(crop) for crop in crops} - set(self.classes)
        if len(self.classes) < 2 or len(slides) < 2 or unknown:
            raise InputError(
                f"--probe-on: {len(self.classes)} classes ({', '.join(self.classes)[:80]}) of "
                f"{len(slides)} slides; at least two of each are needed, and the tested pictures' "
                f"own ({', '.join(sorted(unknown)) or 'all there'})"
            )
        self.crops, self.embedders = crops, embedders
        self.note = (
            "Accuracy: of logistic regression of standardized embeddings of "
            f"{len(self.training):,} originals ({len(self.classes)} classes, {len(slides):,} "
            "slides), each slide by a probe without it; png's row is the originals'"
        )
        self.facts = {"probe": training.digest(), "slides": [c.slide for c in self.training]}
        self._models: dict[tuple[str, str], Any] = {}
        self._originals = MeasuredOriginals([crop.image for crop in self.training], embedders)

    def score(
        self, start: int, _: Sequence[np.ndarray], embeddings: dict[str, np.ndarray]
    ) -> dict[str, list[float | None]]:
        """1 for a class told, else 0, of the crops from `start` on; embeddings (n, D) by name."""
        scores: dict[str, list[float | None]] = {}
        for name, vectors in embeddings.items():
            part = self.crops[start : start + len(vectors)]
            told = [
                self.model(name, crop.slide).predict(vector[None])[0] == class_of(crop)
                for crop, vector in zip(part, vectors, strict=True)
            ]
            scores[f"{name}, accuracy"] = [float(is_told) for is_told in told]
        return scores

    def model(self, name: str, slide: str) -> Any:
        """The probe of an embedder without a slide."""
        if (name, slide) not in self._models:
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler

            LogisticRegression, _ = load_scikit_learn()
            kept = [n for n, crop in enumerate(self.training) if crop.slide != slide]
            labels = [class_of(self.training[n]) for n in kept]
            if len(set(labels)) < 2:
                raise InputError(f"--probe-on: without slide {slide} a single class is left")
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
            model.fit(self._originals.embeddings(name)[kept], labels)
            self._models[name, slide] = model
        return self._models[name, slide]


def class_of(crop: Crop) -> str:
    """The folder a crop's picture lies in."""
    return crop.path.parent.name
