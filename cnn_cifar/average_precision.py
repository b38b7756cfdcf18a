"""How good a detector is: the average precision of COCO.

    A box that is found is a hit when its IoU (intersection / union of the areas) with a true box of its class that is
    not hit yet is at least t; the highest scores choose first. Down the list of all boxes, highest score first,

        precision = hits so far / boxes so far,   recall = hits so far / true boxes,

    and AP is the mean, over the recalls 0, 0.01, … 1, of the best precision at that recall or a larger one. AP50 has
    t = 0.5; AP50:95 is the mean over t = 0.5, 0.55, … 0.95. Both are means over the classes.

Source: Lin et al. 2014, Microsoft COCO, and its evaluation code (101 recalls, each true box hit once).
Shapes: N scenes, D boxes found in all of them, T thresholds.
"""

import numpy as np
from torch import Tensor
from torchvision.ops import box_iou

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


def hits(found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which boxes are hits. found: for each scene boxes (d, 4), labels (d,), scores (d,); truth: boxes, labels.

    Returns scores (D,), labels (D,) and hits, bool (T, D), in the order of the scores, highest first.
    """
    scores, labels, hit = [np.zeros(0)], [np.zeros(0, dtype=np.int64)], [np.zeros((len(THRESHOLDS), 0), dtype=bool)]
    for mine, true in zip(found, truth, strict=True):
        order = mine["scores"].argsort(descending=True, stable=True).cpu()
        boxes, said = mine["boxes"].cpu()[order].double(), mine["labels"].cpu()[order]
        same = said[:, None] == true["labels"][None].cpu()  # (d, true boxes)
        overlap = (box_iou(boxes, true["boxes"].cpu().double()) * same).numpy()
        of_scene = np.zeros((len(THRESHOLDS), len(boxes)), dtype=bool)
        for row, threshold in enumerate(THRESHOLDS):
            left = overlap.copy()  # what may still be hit
            for i in range(len(boxes) if left.shape[1] else 0):
                best = left[i].argmax()
                if left[i, best] >= threshold:
                    of_scene[row, i], left[:, best] = True, 0.0
        scores.append(mine["scores"].cpu().numpy()[order.numpy()])
        labels.append(said.numpy())
        hit.append(of_scene)
    scores = np.concatenate(scores)
    order = np.argsort(-scores, kind="stable")
    return scores[order], np.concatenate(labels)[order], np.concatenate(hit, axis=1)[:, order]


def precision_and_recall(hit: np.ndarray, true_boxes: int) -> tuple[np.ndarray, np.ndarray]:
    """Both after each box of a list sorted by score: hit bool (D,) → (D,), (D,)."""
    so_far = np.cumsum(hit)
    return so_far / np.arange(1, len(hit) + 1), so_far / true_boxes


def average_precision(hit: np.ndarray, true_boxes: int) -> float:
    """AP of one class at one threshold: hit bool (D,), highest score first. Errors: `ValueError` without a true box."""
    if true_boxes < 1:
        raise ValueError("no box to find")
    precision, recall = precision_and_recall(hit, true_boxes)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a larger one
    at = np.searchsorted(recall, RECALLS - 1e-9)  # the first box with so much recall
    return float(np.append(best, 0.0)[np.minimum(at, len(best))].mean())


def by_class(
    found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]], n_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """AP of each class 1 … n_classes at each threshold, NaN for a class without a true box: (n_classes, T).

    And the number of true boxes of each class: (n_classes,).
    """
    _, labels, hit = hits(found, truth)
    true = np.bincount(np.concatenate([one["labels"].cpu().numpy() for one in truth]), minlength=n_classes + 1)[1:]
    table = np.full((n_classes, len(THRESHOLDS)), np.nan)
    for index in np.flatnonzero(true):
        mine = hit[:, labels == index + 1]
        table[index] = [average_precision(row, true[index]) for row in mine]
    return table, true
