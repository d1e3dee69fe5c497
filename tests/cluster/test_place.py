"""The environments of launchers, as their documentation and source have them."""

import http.server
import threading

import pytest

from latent_diffusion_jax.cluster import place as module
from latent_diffusion_jax.cluster.place import Place, find_place, from_metadata, node_list
from latent_diffusion_jax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "5001",
    "SLURM_STEP_NODELIST": "gpu[07-08,11],login",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "first-0.first:8080",
}


def test_alone_where_nothing_is_said():
    assert find_place({}) is None


@pytest.mark.parametrize(
    ("environment", "coordinator", "processes", "process"),
    [
        (
            {
                "JAX_COORDINATOR_ADDRESS": "h:99",
                "JAX_NUM_PROCESSES": "3",
                "JAX_PROCESS_ID": "2",
            },
            "h:99",
            3,
            2,
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "job-0.svc",
                "JAX_NUM_PROCESSES": "3",
                "JOB_COMPLETION_INDEX": "1",
            },
            "job-0.svc:8476",
            3,
            1,
        ),
        (SLURM, f"gpu07:{61440 + 5001 % 2048 * 2}", 4, 2),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "3"}, f"gpu07:{61440 + 5001 % 2048 * 2}", 3, 2),
        (OPEN_MPI, f"10.96.0.1:{61440 + 1531576320 // 4096 % 2048 * 2}", 8, 5),
        (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "head:7000"}, "head:7000", 8, 5),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,2620::2]:43370"},
            f"fe80::1:{61440 + 2}",
            8,
            5,
        ),
        (TPU, "a:8476", 3, 1),
        (TPU | {"JAX_COORDINATOR_PORT": "9000"}, "a:9000", 3, 1),
        (TPU | SLICES, "first-0.first:8476", 6, 4),
    ],
)
def test_launchers(environment, coordinator, processes, process):
    found = find_place(environment)
    assert found[:3] == (coordinator, processes, process)


def test_flags_come_first():
    assert find_place(SLURM, "other:1234", 2, 1)[:3] == ("other:1234", 2, 1)
    assert find_place(SLURM, "other:1234", 1, 0) is None


def test_processes_are_named_by_host():
    found = find_place(SLURM)
    assert [found.name(i) for i in (0, 2, 3)] == [
        "process 0 (gpu07)",
        "process 2 (gpu11)",
        "process 3 (login)",
    ]
    two_each = SLURM | {"SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert find_place(two_each).name(3) == "process 3 (gpu08)"
    cyclic = find_place(two_each | {"SLURM_DISTRIBUTION": "cyclic"})
    assert cyclic.name(3) == "process 3"


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, None),  # one process a node takes all of its GPUs
        ({"SLURM_NTASKS": "8"}, (0,)),
        ({"SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, (1,)),
        ({"SLURM_NTASKS": "8", "CUDA_VISIBLE_DEVICES": "0,1"}, (0,)),
        ({"SLURM_NTASKS": "8", "CUDA_VISIBLE_DEVICES": "1"}, None),  # shown its own only
    ],
)
def test_processes_that_share_a_node_share_its_gpus(changes, devices):
    assert find_place(SLURM | changes).devices == devices


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n1,m2", ["n1", "m2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[001-002,010],m", ["n001", "n002", "n010", "m"]),
        ("a[1-2]-ib,b[3]", ["a1-ib", "a2-ib", "b3"]),
    ],
)
def test_slurm_node_lists(text, names):
    assert node_list(text) == names


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "jax: JAX_COORDINATOR_ADDRESS is not set"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "2"},
            "process 2 is not one of 2",
        ),
        (
            {"JAX_NUM_PROCESSES": "two", "JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "0"},
            "invalid literal",
        ),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "h:x", "JAX_PROCESS_ID": "0"},
            "'h:x' is not HOST:PORT",
        ),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;ud://7"}, "set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_contradictions(environment, message):
    with pytest.raises(UserError, match=message):
        find_place(environment)


def test_flags_in_part():
    with pytest.raises(UserError, match="give all of --coordinator"):
        find_place({}, "h:1", 2, None)


WORKERS = {
    "addresses": "10.0.0.1,10.0.0.2",
    "triples": "unknown:0:10.0.0.1,unknown:1:10.0.0.2",
}


@pytest.mark.parametrize("workers", WORKERS.values(), ids=list(WORKERS))
def test_a_tpu_vm_asks_its_metadata_server(workers, monkeypatch):
    attributes = {
        "agent-worker-number": "1",
        "worker-network-endpoints": workers,
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '1'",
    }

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            known = name in attributes and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        found = from_metadata(module.metadata, {})
        assert module.metadata("nothing") is None
        server.shutdown()
    hosts = ("10.0.0.1", "10.0.0.2")
    assert found == Place("10.0.0.1:8476", 2, 1, "Cloud TPU", hosts)


def test_slices_of_a_tpu_vm():
    attributes = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "10.0.0.1,10.0.0.2",
        "tpu-env": "\n".join(f"{name}: '{value}'" for name, value in SLICES.items()),
    }
    assert from_metadata(attributes.get, {})[:3] == ("first-0.first:8476", 4, 3)
    assert from_metadata({}.get, {}) is None
