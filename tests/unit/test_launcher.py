"""What launchers say of the processes that they start."""

from __future__ import annotations

import pytest

from asyncpipe.errors import Invalid
from asyncpipe_workers.launcher import Place, coordinator_address, device_of, find_place, first_host

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_SERVER_URI2": "1234.1;tcp4://127.0.0.1:9876",  # of the rank's own machine, for processes there
}
OPEN_MPI_4 = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1234.0;tcp://10.0.0.1,10.1.0.1:4567;tcp6://[fd00::1]:4568"}
OPEN_MPI_5 = OPEN_MPI | {"PMIX_NAMESPACE": "prterun-gpu-1-4567@1"}


@pytest.mark.parametrize(
    ("env", "head"),
    [(TORCHRUN, "gpu1"), (SLURM, "gpu07"), (OPEN_MPI_4, "10.0.0.1"), (OPEN_MPI_5, "gpu-1"), (SLURM | TORCHRUN, "gpu1")],
)
def test_each_launcher_gives_a_rank_and_a_head(env: dict[str, str], head: str) -> None:
    place = find_place(env)
    assert place == Place(rank=5, local_rank=1, head=head)
    assert coordinator_address(place, env) == f"tcp://{head}:5550"
    assert coordinator_address(place, env | {"ASYNCPIPE_PORT": "7000"}) == f"tcp://{head}:7000"


def test_without_a_launcher_nothing_is_known() -> None:
    assert find_place({"HOME": "/root"}) == Place()
    assert coordinator_address(Place(), {}) is None


def test_a_launcher_that_does_not_tell_where_rank_0_is_gives_no_address() -> None:
    assert coordinator_address(find_place(OPEN_MPI), {}) is None


def test_a_rank_that_is_no_number_is_a_mistake() -> None:
    with pytest.raises(Invalid, match="RANK=first"):
        find_place({"RANK": "first"})


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [("cuda", 3, "cuda:3"), ("cuda", None, "cuda:0"), ("cuda:1", 3, "cuda:1"), ("cpu", 3, "cpu")],
)
def test_cuda_without_a_number_is_the_local_ranks_card(device: str, local_rank: int | None, expected: str) -> None:
    assert device_of(device, Place(local_rank=local_rank), {}) == expected


@pytest.mark.parametrize(("visible", "expected"), [("", "cuda:3"), ("2", "cuda:0"), ("4,5,6,7", "cuda:3"), ("0,1", "cuda:1")])
def test_a_process_takes_one_of_the_cards_that_its_launcher_lets_it_see(visible: str, expected: str) -> None:
    assert device_of("cuda", Place(local_rank=3), {"CUDA_VISIBLE_DEVICES": visible}) == expected


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu[07-09,12],login1", "gpu07"), ("node1", "node1"), ("node1,node2", "node1"), ("a[3,5]", "a3"), ("r1-n[2-3]", "r1-n2")],
)
def test_the_first_host_of_slurms_lists(hosts: str, first: str) -> None:
    assert first_host(hosts) == first
