from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from custom.corrdiff import FrozenGuard, StageSchedule, TrainingStep, corrdiff_tiny, state_digest


def engine_of(step=lambda engine, batch: None):
    return Engine(step)


def test_the_stage_follows_the_epoch_and_the_encoder_is_frozen_with_it():
    step, seen = TrainingStep(corrdiff_tiny()), []
    encoder = step.corrector.tokeniser.encoder
    engine = engine_of(lambda engine, batch: seen.append((step.stage, next(encoder.parameters()).requires_grad)))
    StageSchedule(step, vq_epochs=2).attach(engine)
    engine.run([0], max_epochs=4)
    assert seen == [("vq", True), ("vq", True), ("diffusion", False), ("diffusion", False)]


def test_resumed_training_is_in_the_same_stage():
    step = TrainingStep(corrdiff_tiny())
    engine = engine_of()
    StageSchedule(step, vq_epochs=1).attach(engine)
    engine.state.epoch, engine.state.iteration = 2, 2
    engine.run([0], max_epochs=3, epoch_length=1)
    assert step.stage == "diffusion" and not next(step.corrector.tokeniser.encoder.parameters()).requires_grad


def test_momentum_and_decay_do_not_move_the_frozen_encoder():
    step, seen = TrainingStep(corrdiff_tiny()), []
    optimizer = torch.optim.AdamW(step.parameters(), lr=0.1)

    def train(engine, batch):
        optimizer.zero_grad(set_to_none=False)
        sum(parameter.square().sum() for parameter in step.parameters() if parameter.requires_grad).backward()
        optimizer.step()
        seen.append(state_digest(step.corrector.tokeniser.encoder))

    engine = engine_of(train)
    StageSchedule(step, vq_epochs=2).attach(engine)
    engine.run([0], max_epochs=4)
    assert seen[0] != seen[1] and seen[1] == seen[2] == seen[3]


def test_no_epochs_for_the_tokeniser_trains_everything_at_once():
    step = TrainingStep(corrdiff_tiny(), "vq")
    engine = engine_of()
    StageSchedule(step, vq_epochs=0).attach(engine)
    engine.run([0], max_epochs=1)
    assert step.stage == "joint"


def test_epochs_for_the_diffusion_must_be_left():
    engine = engine_of()
    StageSchedule(TrainingStep(corrdiff_tiny()), vq_epochs=3).attach(engine)
    with pytest.raises(ValueError, match="leave epochs for the diffusion"):
        engine.run([0], max_epochs=3)


def test_the_step_is_one_call_with_gradients_of_its_stage():
    torch.manual_seed(0)
    step = TrainingStep(corrdiff_tiny(), "vq")
    image, coarse = torch.randn(1, 4, 16, 16, 16), torch.randn(1, 3, 16, 16, 16)
    outputs = step(image, coarse, (coarse > 0).float())
    assert outputs.noise is None and outputs.residual.shape == coarse.shape
    step.stage = "diffusion"
    outputs = step(image, coarse, (coarse > 0).float())
    outputs.predicted_noise.sum().backward()
    assert step.corrector.diffusion.denoiser.end[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("part", ["weight", "running_mean"])
def test_the_guard_stops_training_when_a_frozen_value_changes(part):
    network = nn.Sequential(nn.Conv3d(1, 1, 1), nn.BatchNorm3d(1))

    def change(engine, batch):
        if engine.state.epoch == 2:
            with torch.no_grad():
                getattr(network[1], part).add_(1e-6)

    engine = engine_of(change)
    FrozenGuard(network).attach(engine)
    with pytest.raises(RuntimeError, match="frozen Sequential has changed in epoch 2"):
        engine.run([0], max_epochs=3)
    assert engine.state.epoch == 2


def test_the_guard_takes_gradients_and_training_mode_away():
    network = nn.BatchNorm3d(1).train()
    FrozenGuard(network)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_the_digest_tells_names_values_and_types_apart():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert state_digest(one) == state_digest(other)
    assert state_digest(nn.Sequential(one)) != state_digest(one)
    other.bias.data[0] += 1e-7
    assert state_digest(one) != state_digest(other)
