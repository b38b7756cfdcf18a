"""Faster R-CNN, a real one: where in a scene are digits, and which?

    python cnn_cifar/detect_digits.py --amp
    python cnn_cifar/detect_digits.py --scenes 1000 --epochs 2 --width 16 --amp

A small convolutional backbone makes a feature map, one position for each 8×8 pixels. At every position the region
proposal network predicts for nine boxes of fixed sizes and shapes (anchors) whether they hold anything, and how to move
them; the best of these are cut out of the map, 7×7 features each, and a second network says which digit each holds, or
none, and refines the box. torchvision's `FasterRCNN` does that; the scenes (scenes.py) and the metric
(average_precision.py) are ours. Training scenes hold MNIST's training digits, the held-out ones its test digits; the
last epoch's weights count.

Writes detections.png, precision_recall.png, training.png, history.csv, metrics.json, last.pth.
With --resume a training that was stopped goes on, and ends with the same weights.
Sources: Ren, He, Girshick and Sun 2015 (Faster R-CNN); He et al. 2017 (RoIAlign).
Shapes: B scenes (B, 1, 128, 128) of [0, 1], c the backbone's channels.
"""

import time

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Generator, Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, box_iou

from cnn_cifar.average_precision import THRESHOLDS, by_class, hits, precision_and_recall
from cnn_cifar.inputs import load_splits, pixels
from cnn_cifar.scenes import SIDE, draw_scenes
from cnn_cifar.zoo import convolution
from shared_utils import checkpoint
from shared_utils.cli import UserError, add_amp, make_parser, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.device import autocast, pick_device
from shared_utils.modes import evaluating
from shared_utils.plotting import COLORS, line_style, new_figure, save_figure
from shared_utils.runs import check_finite, start_run
from shared_utils.schedules import one_cycle
from shared_utils.seeding import seed_everything

PARTS = {  # of the loss, under torchvision's names
    "loss_objectness": "anything there?",
    "loss_rpn_box_reg": "box proposal",
    "loss_classifier": "which digit?",
    "loss_box_reg": "box refinement",
}
SURE = 0.5  # boxes with a score above this are drawn
SHOWN = 6  # scenes


class Backbone(nn.Module):
    """Six convolutions, three of stride 2: (B, 1, H, W), normalised → float32 (B, 4 c, H / 8, W / 8)."""

    def __init__(self, width: int, amp: bool):
        super().__init__()
        c, self.amp, self.out_channels = width, amp, 4 * width
        layers = [*convolution(1, c, 2), *convolution(c, c), *convolution(c, 2 * c, 2), *convolution(2 * c, 2 * c)]
        self.layers = nn.Sequential(*layers, *convolution(2 * c, 4 * c, 2), *convolution(4 * c, 4 * c))

    def forward(self, x: Tensor) -> Tensor:
        """See the class. With `amp` in bfloat16 up to here: boxes need float32's precision."""
        with autocast(x.device, self.amp):
            return self.layers(x.contiguous(memory_format=torch.channels_last)).float()


def detector(width: int, num_classes: int, amp: bool) -> FasterRCNN:
    """Faster R-CNN for scenes of SIDE pixels and `num_classes` classes, not counting the background."""
    backbone, pooled = Backbone(width, amp), 7
    return FasterRCNN(
        backbone,
        min_size=SIDE,
        max_size=SIDE,  # as they are
        image_mean=[0.1],
        image_std=[0.25],
        rpn_anchor_generator=AnchorGenerator(sizes=((14, 22, 34),), aspect_ratios=((1.0, 1.5, 3.0),)),
        rpn_pre_nms_top_n_train=200,  # of 2,304 anchors; a scene holds at most six digits
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=50,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(featmap_names=["0"], output_size=pooled, sampling_ratio=2),
        box_head=TwoMLPHead(backbone.out_channels * pooled**2, 256),
        box_predictor=FastRCNNPredictor(256, num_classes + 1),
        box_batch_size_per_image=32,
        box_detections_per_img=20,
    )


def build_parser():
    """The command line."""
    quick = {"scenes": 48, "test_scenes": 24, "epochs": 1, "width": 4}
    parser = make_parser(__doc__, quick=quick)
    parser.add_argument("--scenes", type=positive_int, default=8000, help="scenes to learn from")
    parser.add_argument("--test-scenes", type=positive_int, default=1000, help="held-out scenes of test digits")
    parser.add_argument("--epochs", type=positive_int, default=6, help="passes over the scenes")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="scenes per update")
    parser.add_argument("--width", type=positive_int, default=16, help="channels of the backbone's first layers")
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="highest learning rate of one cycle (AdamW)")
    add_amp(parser, "the backbone computes in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on from last.pth")
    return parser


def main(argv=None) -> dict:
    """Draw scenes, train, measure; returns the metrics."""
    args = build_parser().parse_args(argv)
    if args.batch_size > args.scenes:
        raise UserError(f"--batch-size {args.batch_size}: there are {args.scenes} scenes to train on")
    device = pick_device(args.device)
    data = load_splits(args.dataset, args.data_dir, torch.device("cpu"), shape=(1, 28, 28))
    run = start_run(args)
    classes = len(data.classes)
    scenes, targets = draw_scenes(data.train.x, data.train.y, args.scenes, Generator().manual_seed(args.seed))
    held_out = draw_scenes(data.test.x, data.test.y, args.test_scenes, Generator().manual_seed(args.seed + 1))
    order = seed_everything(args.seed)
    network = detector(args.width, classes, args.amp).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=1e-4, fused=True)
    done, seconds = 0, 0.0
    if args.resume and run.path("last.pth").exists():
        state = checkpoint.load(run.path("last.pth"), device=device)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds = state["epoch"], state["seconds"]
        checkpoint.restore_random_states(state, order)
    run.rewind(done)
    per_epoch = args.scenes // args.batch_size
    for epoch in range(done, args.epochs):
        network.train()
        started, totals = time.perf_counter(), torch.zeros(len(PARTS), device=device)  # read once an epoch
        batches = minibatches(args.scenes, args.batch_size, order, drop_last=True)
        for step, batch in enumerate(batches, start=epoch * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(step, args.epochs * per_epoch, args.lr)
            wanted = [{name: part.to(device) for name, part in targets[i].items()} for i in batch]
            losses = network(list(pixels(scenes[torch.from_numpy(batch)].to(device))), wanted)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            totals += torch.stack([losses[name].detach() for name in PARTS])
        seconds += time.perf_counter() - started
        check_finite(totals.sum().item(), step + 1, args.lr)
        run.log(epoch=epoch + 1, **dict(zip(PARTS, (totals / per_epoch).tolist(), strict=True)), seconds=seconds)
        state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        checkpoint.save(run.path("last.pth"), rng=order, seconds=seconds, **state)

    started = time.perf_counter()
    found = detect(network, held_out[0], device)
    rate = args.test_scenes / (time.perf_counter() - started)
    table, true = by_class(found, held_out[1], classes)
    ap = {"ap50": np.nanmean(table[:, 0]), "ap75": np.nanmean(table[:, 5]), "ap": np.nanmean(table)}
    digits = [
        {"digit": name, "boxes": count, "ap50": row[0], "ap": row.mean()}
        for name, row, count in zip(data.classes, table, true, strict=True)
        if count
    ]
    wrong = mistakes(found, held_out[1])
    about = f"Faster R-CNN, {data.title} in scenes"
    save_figure(draw_training(run.numbers(), about), run.path("training.png"))
    save_figure(draw_curves(found, held_out[1], ap, about), run.path("precision_recall.png"))
    save_figure(draw_detections(held_out, found, data.classes, ap["ap50"], about), run.path("detections.png"))
    parameters = sum(p.numel() for p in network.parameters())
    counts = {"scenes": args.scenes, "test_scenes": args.test_scenes, "test_boxes": int(true.sum())}
    speed = {"training_seconds": seconds, "test_scenes_per_second": rate}
    rest = {"parameters": parameters, "epochs": args.epochs, "by_digit": digits}
    return run.finish({**ap, **wrong, **counts, **speed, **rest})


@torch.no_grad()
def detect(network: FasterRCNN, scenes: Tensor, device: torch.device) -> list[dict[str, Tensor]]:
    """What is found in each scene of uint8 (N, 1, H, W): boxes (d, 4), labels (d,), scores (d,), on the CPU."""
    found = []
    with evaluating(network):
        for some in scenes.split(50):
            found += [
                {name: part.cpu() for name, part in one.items()} for one in network(list(pixels(some.to(device))))
            ]
    return found


def mistakes(found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> dict[str, int]:
    """Of the boxes with a score above SURE: how many hit, name the wrong digit, fit none (IoU below ½); digits missed.

    A duplicate counts among the wrong digits; a digit is missed where no box has an IoU of ½ with it.
    """
    count = {"right": 0, "wrong_digit": 0, "no_digit": 0, "missed": 0}
    for mine, true in zip(found, truth, strict=True):
        sure = mine["scores"] > SURE
        overlap = box_iou(mine["boxes"][sure], true["boxes"])  # (d, true boxes)
        best = torch.cat([overlap, overlap.new_zeros(len(overlap), 1)], 1).amax(1)  # 0 where there is no true box
        _, _, hit = hits([{name: part[sure] for name, part in mine.items()}], [true])
        count["right"] += int(hit[0].sum())
        count["wrong_digit"] += int((best >= 0.5).sum()) - int(hit[0].sum())
        count["no_digit"] += int((best < 0.5).sum())
        count["missed"] += int((overlap >= 0.5).any(0).logical_not().sum())
    return count


def draw_training(history: list[dict[str, float]], about: str):
    """The four parts of the loss after each epoch."""
    figure, axes = new_figure(width=7.0, height=4.2)
    epochs = [row["epoch"] for row in history]
    for index, (name, label) in enumerate(PARTS.items()):
        values = [row[name] for row in history]
        axes[0, 0].plot(epochs, values, marker="o", label=f"{label} ({name})", **line_style(index))
    axes[0, 0].set(yscale="log", xlabel="epoch", ylabel="mean training loss of the epoch")
    axes[0, 0].legend()
    largest = max(PARTS, key=lambda name: history[-1][name])
    figure.suptitle(f"{about}:\nat the end “{PARTS[largest]}” is the largest part of the loss")
    return figure


def draw_curves(found: list[dict], truth: list[dict], ap: dict, about: str):
    """Precision against recall of all digits together, at three thresholds of the IoU."""
    _, _, hit = hits(found, truth)
    boxes = sum(len(one["labels"]) for one in truth)
    figure, axes = new_figure(width=6.8, height=4.6)
    for index, row in enumerate((0, 5, 8)):
        precision, recall = precision_and_recall(hit[row], boxes)
        style = line_style(index)
        axes[0, 0].plot(100 * recall, 100 * precision, label=f"IoU ≥ {THRESHOLDS[row]:.2f}", **style)
    axes[0, 0].set(xlabel="recall (%): true boxes that are hit", ylabel="precision (%): found boxes that hit")
    axes[0, 0].set(xlim=(0, 102), ylim=(0, 102))
    axes[0, 0].legend(loc="lower left")
    figure.suptitle(f"{about}:\nAP50 {ap['ap50']:.1%}, AP75 {ap['ap75']:.1%}, AP50:95 {ap['ap']:.1%}")
    return figure


def draw_detections(held_out: tuple[Tensor, list[dict]], found: list[dict], classes, ap50: float, about: str):
    """Above the first scenes; below those with the surest mistakes. True boxes dashed, found ones solid."""
    scenes, truth = held_out
    worst = sorted(range(len(truth)), key=lambda i: -surest_mistake(found[i], truth[i]))
    half = SHOWN // 2
    rest = [i for i in worst if i >= half]
    shown = [*range(min(half, len(truth))), *rest[:half]]
    figure, axes = new_figure(2, half, width=8.6, height=6.4)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, i in zip(axes.flat, shown, strict=False):
        ax.imshow(scenes[i, 0].numpy(), vmin=0, vmax=255, interpolation="nearest")
        for box in truth[i]["boxes"]:
            ax.add_patch(outline(box, COLORS[5], "--"))
        for box, label, score in zip(*(found[i][key] for key in ("boxes", "labels", "scores")), strict=True):
            if score > SURE:
                ax.add_patch(outline(box, COLORS[4], "-"))
                said = f"{classes[label - 1]} {score:.0%}"
                ax.text(float(box[0]), float(box[1]) - 2, said, color=COLORS[4], fontsize=8)
    figure.suptitle(
        f"{about}, AP50 {ap50:.1%}: above the first held-out scenes,\nbelow those with the surest mistakes "
        f"(dashed blue: true; orange: found, with a score above {SURE:.0%})"
    )
    return figure


def surest_mistake(mine: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """The highest score of a box that is no hit at IoU ½; 0 where there is none."""
    scores, _, hit = hits([mine], [true])
    return float(scores[~hit[0]].max(initial=0.0))


def outline(box: Tensor, color: str, linestyle: str) -> Rectangle:
    """A box's outline, in pixels of the image."""
    left, top, right, bottom = (float(edge) for edge in box)
    return Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color=color, linestyle=linestyle)


if __name__ == "__main__":
    run_main(main, build_parser)
