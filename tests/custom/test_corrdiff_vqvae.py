"""Tokeniser of residuals: codebook against numpy, against MONAI's collapsing one, and on sizes that do not divide."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer, VectorQuantizer
from numpy.testing import assert_allclose

from custom.corrdiff import LatentScale
from custom.corrdiff.vqvae import Codebook, ResidualVQVAE, crop_like, pad_to_multiple


def mixture(seed: int = 0, clusters: int = 16, background: float = 0.9, spread: float = 0.05) -> torch.Tensor:
    """`[1, 4, 16, 16, 16]` latents: most near one point, as residuals are, the rest around `clusters` others."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(clusters, 4)) * 3
    choice = rng.integers(clusters, size=4096)
    points = np.where(rng.random((4096, 1)) < background, 0.0, centres[choice]) + rng.normal(size=(4096, 4)) * spread
    return torch.from_numpy(points.T.reshape(1, 4, 16, 16, 16).astype("float32"))


def tiny(**changes) -> ResidualVQVAE:
    torch.manual_seed(0)
    return ResidualVQVAE(**({"channels": (8, 16), "num_codes": 16, "latent_channels": 4} | changes))


def test_picks_the_nearest_code_and_counts_perplexity():
    book, latent = Codebook(8, 4), mixture()
    found = book(latent)
    vectors, codes = latent[0].flatten(1).T.numpy(), book.codes.numpy()
    index = ((vectors[:, None] - codes) ** 2).sum(2).argmin(1)
    share = np.bincount(index, minlength=8) / len(index)
    assert_allclose(found.latent[0].flatten(1).T.numpy(), codes[index], atol=1e-5)
    assert_allclose(found.perplexity, np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))), rtol=1e-5)


@pytest.mark.parametrize("commitment", [1.0, 0.5])
def test_loss_is_codebook_plus_commitment_and_is_not_weighted_by_lambda(commitment):
    book, latent = Codebook(8, 4, commitment=commitment), mixture().requires_grad_()
    found = book(latent)
    mean_square = ((latent - found.latent) ** 2).mean().item()
    assert_allclose(found.loss.item(), (1 + commitment) * mean_square, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.loss, latent)
    expected = commitment * 2 * (latent - found.latent) / latent.numel()
    torch.testing.assert_close(gradient, expected.detach())


def test_gradient_passes_straight_through():
    latent = mixture().requires_grad_()
    Codebook(8, 4)(latent).latent.backward(torch.full_like(latent, 0.7))
    assert torch.equal(latent.grad, torch.full_like(latent, 0.7))


def test_codes_come_from_the_first_batch_and_find_rare_clusters():
    torch.manual_seed(0)
    book = Codebook(64, 4)
    latent = mixture(2, background=0.98)
    uniform = latent[0].flatten(1).T[torch.randint(4096, (64,))]
    book(latent, update=True)
    centres = np.random.default_rng(99).normal(size=(16, 4)) * 3
    centres = torch.from_numpy(centres).float()
    assert bool(book.initialised)
    assert torch.cdist(centres, book.codes).amin(1).max() < 0.3
    assert torch.cdist(centres, uniform).amin(1).max() > 1


def test_perplexity_stays_high_where_monais_quantiser_collapses():
    torch.manual_seed(0)
    own, monai = Codebook(32, 4), VectorQuantizer(EMAQuantizer(3, 32, 4, ddp_sync=False))
    for seed in range(10):
        latent = mixture(seed, background=0.0) * 0.1
        perplexity = own(latent, update=True).perplexity
        monai(latent)
    assert monai.perplexity < 6
    assert perplexity > 12


def test_dead_codes_restart_from_the_batch():
    torch.manual_seed(0)
    restarting, idle = Codebook(32, 4), Codebook(32, 4, restart_below=0.0)
    perplexities = []
    for book in (restarting, idle):
        book.codes.fill_(1e3)
        book.codes[0] = 0.0
        book.sums.copy_(book.codes)
        book.sizes.fill_(1.0)
        book.sizes[1:] = 0.0
        book.initialised.fill_(True)
        perplexities += [book(mixture(background=0.5), update=True).perplexity for _ in range(3)][-1:]
    assert perplexities[1] == 1
    assert perplexities[0] > 5
    assert restarting.codes.abs().max() < 20


def test_codes_are_running_means_with_laplace_smoothing():
    book, latent = Codebook(4, 4, decay=0.9, restart_below=0.0, eps=0.5), mixture()
    book.initialised.fill_(True)
    book.sizes.fill_(10.0)
    book.sums.copy_(10 * book.codes)
    vectors, codes = latent[0].flatten(1).T.numpy().astype("float64"), book.codes.numpy().astype("float64")
    index = ((vectors[:, None] - codes) ** 2).sum(2).argmin(1)
    book(latent, update=True)
    sizes = 0.9 * 10 + 0.1 * np.bincount(index, minlength=4)
    sums = 0.9 * 10 * codes + 0.1 * np.stack([vectors[index == k].sum(0) for k in range(4)])
    smoothed = (sizes + 0.5) / (sizes.sum() + 4 * 0.5) * sizes.sum()
    assert_allclose(book.codes.numpy(), sums / smoothed[:, None], rtol=1e-4)


def test_same_seed_gives_the_same_codes_and_nothing_changes_without_update():
    books = []
    for _ in range(2):
        torch.manual_seed(3)
        books.append(Codebook(16, 4))
        books[-1](mixture(), update=True)
    assert torch.equal(books[0].codes, books[1].codes)
    before = {name: value.clone() for name, value in books[0].state_dict().items()}
    books[0].train()(mixture(1))
    assert all(torch.equal(value, before[name]) for name, value in books[0].state_dict().items())


def test_constant_latents_do_not_break_the_draw():
    found = Codebook(8, 4)(torch.ones(1, 4, 2, 2, 2), update=True)
    assert found.perplexity == 1
    assert torch.isfinite(found.latent).all()


@pytest.mark.parametrize("shape", [(16, 8, 12), (7, 9, 5), (1, 1, 1)])
def test_any_size_comes_back(shape):
    network, residual = tiny(), torch.rand(2, 3, *shape) * 2 - 1
    reconstruction, quantised = network(residual)
    assert reconstruction.shape == residual.shape
    assert quantised.latent.shape[2:] == tuple(-(-size // 4) for size in shape)
    assert reconstruction.abs().max() <= 1


def test_padding_goes_to_the_end_and_comes_off():
    x = torch.rand(1, 2, 5, 6, 7)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (1, 2, 8, 8, 8)
    assert padded[:, :, 5:].abs().sum() == 0
    assert torch.equal(crop_like(padded, x), x)


def test_learns_to_reconstruct_a_residual():
    network = tiny()
    residual = torch.zeros(1, 3, 16, 16, 16)
    residual[:, :, 4:10, 4:12, 6:12] = 0.9
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    errors = []
    for _ in range(80):
        reconstruction, quantised = network(residual, update=True)
        error = (reconstruction - residual).abs().mean()
        optimiser.zero_grad()
        (error + 0.25 * quantised.loss).backward()
        optimiser.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * residual.abs().mean()


def test_state_dict_goes_round_without_pickle():
    source, target, residual = tiny(), tiny(), torch.rand(1, 3, 8, 8, 8)
    source(residual, update=True)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert bool(target.codebook.initialised)
    assert torch.equal(target(residual)[0], source(residual)[0])


def test_codes_that_do_not_fill_a_latent_vector_are_refused():
    with pytest.raises(ValueError, match="1 codes of 6 channels do not fill a latent vector of 4"):
        tiny(codebook=Codebook(16, 6))
    with pytest.raises(ValueError, match="3 codes of 1 channels do not fill a latent vector of 4"):
        tiny(codes_per_vector=3)


def test_a_latent_vector_may_be_several_codes_side_by_side():
    book, latent = Codebook(8, 2), mixture()
    found = book(latent)
    pairs, codes = latent[0].flatten(1).T.numpy().reshape(-1, 2, 2), book.codes.numpy()
    index = ((pairs[:, :, None] - codes) ** 2).sum(3).argmin(2)
    expected = np.concatenate([codes[index[:, 0]], codes[index[:, 1]]], 1)
    assert_allclose(found.latent[0].flatten(1).T.numpy(), expected, atol=1e-5)
    share = np.bincount(index.ravel(), minlength=8) / index.size
    assert_allclose(found.perplexity, np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))), rtol=1e-5)


def test_one_level_of_stride_4_reaches_the_grid_of_two_of_stride_2():
    network, residual = (
        tiny(channels=(16,), stride=4, latent_channels=8, codes_per_vector=2),
        torch.zeros(1, 3, 9, 16, 8),
    )
    reconstruction, quantised = network(residual)
    assert network.factor == 4
    assert quantised.latent.shape == (1, 8, 3, 4, 2)
    assert reconstruction.shape == residual.shape


SEVERAL = """
import sys, torch, torch.distributed as dist
from custom.corrdiff import LatentScale
from custom.corrdiff import LatentScale
from custom.corrdiff.vqvae import Codebook

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
latents = torch.randn(3, 2, 4, 6, 6, 6, generator=torch.Generator().manual_seed(5))
latents += torch.arange(2).view(1, 2, 1, 1, 1, 1)
book, scale = Codebook(8, 4, restart_below=0.0), LatentScale(4)
for latent in latents:
    book(latent[rank : rank + 1], update=True)
    scale.update(latent[rank : rank + 1])
dead = Codebook(8, 4, restart_below=100.0)
for latent in latents:
    dead(latent[rank : rank + 1], update=True)
torch.save([module.state_dict() for module in (book, scale, dead)], f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_of_several_processes_each_counts_and_all_have_the_same_codes(tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "learn.py").write_text(SEVERAL)
    subprocess.run([*start, str(tmp_path / "learn.py"), str(tmp_path)], check=True, timeout=120)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    latents = torch.randn(3, 2, 4, 6, 6, 6, generator=torch.Generator().manual_seed(5))
    latents += torch.arange(2).view(1, 2, 1, 1, 1, 1)
    scale = LatentScale(4)
    for latent in latents:
        scale.update(latent)
    assert_allclose(first[1]["mean"], scale.mean, atol=1e-6)
    assert_allclose(first[1]["square"], scale.square, rtol=1e-5)
    assert first[0]["sizes"].sum().item() == pytest.approx(2 * 6**3, rel=1e-5)
