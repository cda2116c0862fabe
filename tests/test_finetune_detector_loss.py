"""The detector's loss against sums done by hand, and on real networks of both families with small random weights."""

from __future__ import annotations

import math

import pytest
import torch
from test_grounding_dino import FAMILIES, save_checkpoint
from transformers import AutoModelForZeroShotObjectDetection, GroundingDinoConfig
from transformers.loss.loss_grounding_dino import GroundingDinoForObjectDetectionLoss

from finetune.grounding.loss import Cells, Predictions, detection_loss, near_centre
from finetune.grounding.predict import predict

TOKENS = 6
BOX = [0.5, 0.5, 0.2, 0.2]
ELSEWHERE = [0.1, 0.1, 0.1, 0.1]


def names(*columns: tuple[int, ...]) -> torch.Tensor:
    """Rows of 0/1 over the tokens, one for each name."""
    rows = torch.zeros(len(columns), TOKENS)
    for row, ones in zip(rows, columns, strict=True):
        row[list(ones)] = 1
    return rows


# Three pictures whose prompts hold one, three and two names, and the thing in each: its name and its box.
PROMPTS = [names((1,)), names((1,), (2,), (3, 4)), names((1, 2), (3,))]
THINGS = [0, 2, 1]


def three_pictures() -> tuple[torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Logits (3, 2, T) and boxes (3, 2, 4): in each picture query 0 has the thing, query 1 is elsewhere."""
    logits = torch.linspace(-2, 1, 3 * 2 * TOKENS).reshape(3, 2, TOKENS)
    boxes = torch.tensor([[BOX, ELSEWHERE]] * 3)
    truths = [
        {"boxes": torch.tensor([BOX]), "tokens": prompt[[thing]]} for prompt, thing in zip(PROMPTS, THINGS, strict=True)
    ]
    return logits, boxes, truths


def focal_by_hand(logit: float, positive: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return 0.25 * (1 - p) ** 2 * -math.log(p) if positive else 0.75 * p**2 * -math.log(1 - p)


def tokens_by_hand(logits: torch.Tensor, pictures: range) -> float:
    """The focal loss of `pictures`, per thing, where query 0 ought to say the thing's name and nothing else is said."""
    total = 0.0
    for i in pictures:
        wanted = PROMPTS[i][THINGS[i]]
        for query in range(2):
            for token in range(TOKENS):
                total += focal_by_hand(float(logits[i, query, token]), query == 0 and bool(wanted[token]))
    return total / len(pictures)


def transformers_loss(pictures: slice) -> float:
    """The class part of transformers' own loss, times its weight."""
    logits, boxes, truths = (part[pictures] for part in three_pictures())
    config = GroundingDinoConfig(two_stage=False, auxiliary_loss=False, class_cost=2.0)
    labels = [
        {"class_labels": torch.tensor([thing]), "boxes": truth["boxes"]}
        for truth, thing in zip(truths, THINGS[pictures], strict=True)
    ]
    everything = torch.ones(logits.shape, dtype=torch.bool)
    loss, _, _ = GroundingDinoForObjectDetectionLoss(
        logits, labels, "cpu", boxes, config, tuple(PROMPTS[pictures]), everything
    )
    return float(loss)


def our_loss(pictures: slice, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    logits, boxes, truths = (part[pictures] for part in three_pictures())
    mask = torch.ones(len(logits), TOKENS, dtype=torch.bool)
    predicted = Predictions(changes.get("logits", logits)[None], changes.get("boxes", boxes)[None], mask, None)
    return detection_loss(predicted, truths)


def test_pictures_with_different_numbers_of_names_cost_what_is_computed_by_hand():
    losses = our_loss(slice(0, 3))
    assert float(losses["tokens"]) == pytest.approx(2 * tokens_by_hand(three_pictures()[0], range(3)), rel=1e-5)
    assert float(losses["boxes"]) == pytest.approx(0, abs=1e-5)


def test_transformers_own_loss_is_right_for_one_picture_and_wrong_for_three():
    # Why there is a loss here: theirs takes the third picture's name from the wrong picture's prompt.
    logits = three_pictures()[0]
    assert transformers_loss(slice(0, 1)) == pytest.approx(2 * tokens_by_hand(logits, range(1)), rel=1e-5)
    assert transformers_loss(slice(0, 3)) != pytest.approx(2 * tokens_by_hand(logits, range(3)), rel=1e-2)


def test_a_box_beside_its_thing_costs_its_distance_and_overlap():
    boxes = three_pictures()[1][:1].clone()
    boxes[0, 0, 0] += 0.1  # half its width: L1 0.1; overlap 1/3 of the union, no gap in the hull
    assert float(our_loss(slice(0, 1), boxes=boxes)["boxes"]) == pytest.approx(5 * 0.1 + 2 * (1 - 1 / 3), rel=1e-4)


def test_every_decoder_layer_is_matched_and_counted():
    logits, boxes, truths = three_pictures()
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    exchanged = logits.flip(1), boxes.flip(1)  # in the second layer it is query 1 that has the thing
    both = Predictions(torch.stack([logits, exchanged[0]]), torch.stack([boxes, exchanged[1]]), mask, None)
    one = detection_loss(Predictions(logits[None], boxes[None], mask, None), truths)
    two = detection_loss(both, truths)
    assert float(two["loss"]) == pytest.approx(2 * float(one["loss"]), rel=1e-5)


def test_the_padding_of_a_prompt_costs_nothing():
    logits, boxes, truths = three_pictures()
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    plain = detection_loss(Predictions(logits[None], boxes[None], mask, None), truths)["loss"]
    wider = torch.cat([logits, torch.full((3, 2, 2), -torch.inf)], -1)
    truths = [{**truth, "tokens": torch.cat([truth["tokens"], torch.zeros(1, 2)], 1)} for truth in truths]
    mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    padded = detection_loss(Predictions(wider[None], boxes[None], mask, None), truths)["loss"]
    assert float(padded) == pytest.approx(float(plain), rel=1e-6)


def test_pictures_without_things_and_with_more_things_than_queries_have_a_loss():
    logits, boxes, truths = three_pictures()
    truths[0] = {"boxes": torch.zeros(0, 4), "tokens": torch.zeros(0, TOKENS)}
    truths[1] = {"boxes": torch.tensor([BOX, ELSEWHERE, BOX]), "tokens": PROMPTS[1]}
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    assert float(detection_loss(Predictions(logits[None], boxes[None], mask, None), truths)["loss"]) > 0


def grid(*shapes: tuple[int, int]) -> Cells:
    """The cells of levels of that many rows and columns, all usable."""
    centres, sizes, levels = [], [], []
    for level, (rows, columns) in enumerate(shapes):
        for row in range(rows):
            for column in range(columns):
                centres.append([(column + 0.5) / columns, (row + 0.5) / rows])
                sizes.append([1 / columns, 1 / rows])
                levels.append(level)
    none = torch.zeros(1, len(levels), 1)
    return Cells(
        none, none, torch.tensor(centres), torch.tensor(sizes), torch.tensor(levels), torch.ones(len(levels)) > 0
    )


def owners(cells: Cells, boxes: list[list[float]]) -> torch.Tensor:
    return near_centre(torch.tensor(boxes), cells.centres, cells.sizes, cells.levels, cells.usable)


@pytest.mark.parametrize(
    ("side", "levels"),
    [
        (0.02, {0}),  # smaller than any cell: the finest level has it
        (0.15, {0}),
        (0.25, {0, 1}),  # four cells of the finest level, two of the next
        (0.45, {1, 2}),
        (0.95, {2}),
    ],
)
def test_a_thing_is_proposed_at_the_levels_where_it_is_a_few_cells_long(side, levels):
    cells = grid((16, 16), (8, 8), (4, 4))
    owner = owners(cells, [[0.5, 0.5, side, side]])
    assert set(cells.levels[owner == 0].tolist()) == levels


def test_of_two_things_at_one_place_the_smaller_one_is_proposed_there():
    cells = grid((8, 8))
    owner = owners(cells, [[0.5, 0.5, 0.9, 0.9], [0.5, 0.5, 0.1, 0.1]])
    middle = (cells.centres - 0.5).abs().sum(1).argmin()
    assert owner[middle] == 1
    assert (owner == 0).any()


@pytest.fixture(scope="module", params=FAMILIES)
def network(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    save_checkpoint(folder, request.param)
    return AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """A picture of 64 x 96 pixels and one of 64 x 48, padded, asked for two words and for one."""
    torch.manual_seed(0)
    mask = torch.ones(2, 64, 96, dtype=torch.long)
    mask[1, :, 48:] = 0
    return {
        "pixel_values": torch.randn(2, 3, 64, 96) * mask[:, None],
        "pixel_mask": mask,
        "input_ids": torch.tensor([[101, 1030, 1012, 1031, 1012, 102], [101, 1032, 1012, 102, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        "token_type_ids": torch.zeros(2, 6, dtype=torch.long),
    }


TRUTHS = [{"boxes": torch.tensor([BOX]), "tokens": names((1,))}, {"boxes": torch.tensor([BOX]), "tokens": names((1,))}]


def test_a_pass_says_the_same_as_the_model_alone(network, batch):
    with torch.no_grad():
        predicted, output = predict(network, batch), network(**batch)
    torch.testing.assert_close(predicted.logits[-1], output.logits[..., :TOKENS])
    torch.testing.assert_close(predicted.boxes[-1], output.pred_boxes)
    assert len(predicted.logits) == network.config.decoder_layers


def test_cells_lie_where_the_model_proposes_boxes_also_beside_padding(network, batch):
    head = network.model.encoder_output_bbox_embed.layers[-1]
    kept = head.weight.detach().clone(), head.bias.detach().clone()
    with torch.no_grad():
        head.weight.zero_(), head.bias.zero_()  # so that each box is the model's own start at that cell
        cells = predict(network, batch).cells
        head.weight.copy_(kept[0]), head.bias.copy_(kept[1])
    assert cells.usable.sum(1).tolist()[0] > cells.usable.sum(1).tolist()[1] > 0
    for row in range(2):
        usable = cells.usable[row]
        torch.testing.assert_close(cells.boxes[row, usable, :2], cells.centres[row, usable])


@pytest.mark.parametrize("proposals", ["matched", "centres"])
def test_all_heads_and_the_image_encoder_learn(network, batch, proposals):
    network.zero_grad()
    detection_loss(predict(network, batch), TRUTHS, proposals=proposals)["loss"].backward()
    for part in ("encoder_output_bbox_embed", "bbox_embed.0", "text_backbone", "conv_encoder", "enc_output."):
        gradients = [p.grad for n, p in network.named_parameters() if part in n and p.grad is not None]
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0, part


def test_transformers_own_loss_teaches_the_encoders_boxes_nothing(network, batch):
    network.zero_grad()
    labels = [{"class_labels": torch.tensor([0]), "boxes": truth["boxes"]} for truth in TRUTHS]
    network(**batch, labels=labels).loss.backward()
    gradients = [p.grad for n, p in network.named_parameters() if "encoder_output_bbox_embed" in n]
    assert gradients
    assert all(gradient is None or not gradient.any() for gradient in gradients)
