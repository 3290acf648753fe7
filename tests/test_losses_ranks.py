"""Two processes give the loss, the gradient and the memory of one process; DDP finds what losses learn."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from laws import subject
from torch.nn.parallel import DistributedDataParallel

from kdlib import losses

WORLD = 2
LEARN = sorted(name for name in losses.LOSSES if subject(name).learned or name == "learnable_temperature")
NAMES = ("one", "both", "crd")


def data():
    torch.manual_seed(0)
    return torch.randn(8, 5), torch.randn(8, 5), torch.tensor([3, 1, 7, 2, 9, 1, 4, 0]), torch.randint(12, (8, 7))


def make(name):
    torch.manual_seed(1)
    if name == "crd":
        return losses.CRD(12, dim=4, negatives=6, student_size=5, teacher_size=5)
    return losses.InfoNCE(0.2, symmetric=name == "both")


def run(name, loss, student, teacher, indices, contrast):
    weight = torch.eye(5, requires_grad=True)
    against = (teacher, indices, contrast) if name == "crd" else (teacher,)
    value = loss(student @ weight, *against)
    value.backward()
    return value.detach(), weight.grad


def work(rank, port, results):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mine = slice(4 * rank, 4 * rank + 4)
    for name in NAMES:
        loss = make(name)
        value, grad = run(name, loss, *(x[mine] for x in data()))
        for x in (value, grad):
            dist.all_reduce(x)
            x /= WORLD
        for state in loss.state_dict().values():
            everywhere = [torch.empty_like(state) for _ in range(WORLD)]
            dist.all_gather(everywhere, state)
            assert torch.equal(*everywhere), "the ranks' states differ"
        if rank == 0:
            results.put((value.numpy(), grad.numpy(), {k: v.numpy() for k, v in loss.state_dict().items()}))
    for name in LEARN:
        torch.manual_seed(rank)
        case = subject(name)
        student, *against = case.inputs(seed=rank)
        loss = case.make()
        loss.fit(student, against[0], head=torch.nn.Linear(8, 3))
        wrapped = DistributedDataParallel(loss)
        wrapped(student, *against).backward()
        for place, parameter in loss.named_parameters():
            everywhere = [torch.empty_like(parameter) for _ in range(WORLD)]
            dist.all_gather(everywhere, parameter.grad)
            assert torch.equal(*everywhere), f"gradients of {name}'s {place} differ"
            assert everywhere[0].abs().sum() > 0, (name, place)
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_agree_with_the_whole_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=work, args=(rank, port, results), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    found = {name: results.get(timeout=120) for name in NAMES}
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    for name, (value, grad, state) in found.items():
        loss = make(name)
        expected, expected_grad = run(name, loss, *data())
        torch.testing.assert_close(torch.from_numpy(value), expected)
        torch.testing.assert_close(torch.from_numpy(grad), expected_grad)
        for key, kept in loss.state_dict().items():
            torch.testing.assert_close(torch.from_numpy(state[key]), kept)
