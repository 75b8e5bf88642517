"""Which process of which run this is, and how the processes of a run meet; no training."""

import socket
import threading
import time

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import yaml
from fences import ROOT, fences
from runs import connected, free_port

from jdecouple.train import cli as command_line
from jdecouple.train.hosts import MultiProcess, ProcessSpec, detect_cluster, exchange, join, token
from jdecouple.train.hosts.link import Link

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "gpu[007-009,012],login1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
}
VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "a:1",
    "JAX_NUM_PROCESSES": "3",
    "JAX_PROCESS_ID": "2",
}
FLAGS = {"coordinator": "10.0.0.1:1234", "count": 2, "index": 0}


class TestDetectCluster:
    @pytest.mark.parametrize(
        ("environ", "flags", "wanted"),
        [
            ({}, FLAGS, ProcessSpec("10.0.0.1:1234", 2, 0)),
            ({}, {**FLAGS, "address": "h"}, ProcessSpec("10.0.0.1:1234", 2, 0, "h")),
            (VARIABLES, {}, ProcessSpec("a:1", 3, 2)),
            (
                {key.removeprefix("JAX_"): v for key, v in VARIABLES.items()},
                {},
                ProcessSpec("a:1", 3, 2),
            ),
            ({**VARIABLES, "JAX_PROCESS_ID": "0"}, {"index": 1}, ProcessSpec("a:1", 3, 1)),
            (SLURM, {}, ProcessSpec(f"gpu007:{61440 + 5000 - 4096}", 4, 3, launched=True)),
            (
                {**SLURM, "SLURM_STEP_NODELIST": "a1,b2", "JAX_COORDINATOR_PORT": "99"},
                {},
                ProcessSpec("a1:99", 4, 3, launched=True),
            ),
            ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {}, None),
            (SLURM, {"coordinator": "b:5"}, ProcessSpec("b:5", 4, 3, launched=True)),
            (OPEN_MPI, {}, ProcessSpec(f"10.96.0.1:{61440 + 373920 % 4096}", 2, 1, launched=True)),
            (
                {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,fe80::2]:1"},
                {},
                ProcessSpec("[fe80::1]:61441", 2, 1, launched=True),
            ),
            (
                {key: OPEN_MPI[key] for key in OPEN_MPI if "uri" not in key},
                {"coordinator": "a:1"},
                ProcessSpec("a:1", 2, 1, launched=True),
            ),
            (SLURM, {"count": 1}, None),
            ({}, {"count": 1, "index": 0}, None),
            ({"NUM_PROCESSES": "4", "PROCESS_ID": "1"}, {}, None),
            ({}, {}, None),
        ],
    )
    def test_flags_then_variables_then_launchers(self, environ, flags, wanted):
        assert detect_cluster(environ, **flags) == wanted

    @pytest.mark.parametrize(
        ("environ", "flags", "said"),
        [
            ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}, "without --num_processes and --process_index"),
            ({**VARIABLES, "JAX_PROCESS_ID": "3"}, {}, "the process index is 3: 0 to 2"),
            ({**VARIABLES, "JAX_NUM_PROCESSES": "x"}, {}, "JAX_NUM_PROCESSES is 'x'"),
            ({}, {**FLAGS, "coordinator": "host"}, "'host': host:port is needed"),
            ({}, {**FLAGS, "coordinator": "host:70000"}, "host:port is needed"),
            ({}, {"address": "h"}, "--transport_address is given, but this is a run of one"),
        ],
    )
    def test_half_a_spec(self, environ, flags, said):
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            detect_cluster(environ, **flags)
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coordinator=h:1"], "--coordinator given without --num_processes and --process_index"),
        (["--num_processes=2"], "--num_processes given without --coordinator and --process_index"),
        (["--coordinator=h:1", "--num_processes=2"], "without --process_index: a run of several"),
        (["--coordinator=h", "--num_processes=2", "--process_index=0"], "host:port is needed"),
        (
            ["--coordinator=h:1", "--num_processes=2", "--process_index=2"],
            "0 to 1 is allowed for 2",
        ),
        (
            ["--coordinator=h:1", "--num_processes=1", "--process_index=0"],
            "at least 2 are needed",
        ),
        (["--num_processes=two"], "--num_processes=two"),
        (["--process_index"], "process_index"),
    ],
)
def test_bad_flags(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "log_in_short", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["train.py", *runs.arguments(tmp_path / "run"), *flags])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "run").exists()


class TestJoin:
    """What keeps processes from meeting; how they meet, tests/train/test_hosts.py shows."""

    def test_a_process_that_does_not_come(self):
        with pytest.raises(ValueError, match=r"^process 1, 2 of 3 did not come to 127.0.0.1:\d+$"):
            join(ProcessSpec(f"127.0.0.1:{free_port()}", 3, 0), patience=0.2)

    def test_no_process_to_find(self):
        with pytest.raises(ValueError, match=r"^process 0 was not found at 127.0.0.1:\d+: "):
            join(ProcessSpec(f"127.0.0.1:{free_port()}", 2, 1), patience=0.2)

    def test_a_port_that_is_taken(self):
        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ValueError, match=f"^process 0 cannot wait at 127.0.0.1:{port}: "):
                join(ProcessSpec(f"127.0.0.1:{port}", 2, 0), patience=5)

    @pytest.mark.parametrize(
        ("places", "said"),
        [
            ([(2, 0), (3, 1)], "came with num_processes = 3, process 0 with 2"),
            ([(3, 0), (3, 1), (3, 1)], "two processes came with the index 1"),
        ],
    )
    def test_processes_of_different_runs(self, places, said):
        """All are told, and whoever is no process of a run is not minded."""
        port, told = free_port(), []

        def come(count: int, index: int) -> None:
            try:
                join(ProcessSpec(f"127.0.0.1:{port}", count, index), patience=20)
            except ValueError as error:
                told.append(str(error))

        threads = [threading.Thread(target=come, args=place) for place in places]
        threads[0].start()
        with connected(port) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(told) == len(places)
        assert all(said in each for each in told)


@pytest.fixture
def three():
    """Three processes of a run, here threads of one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = [Link(connected(server.getsockname()[1])) for _ in range(2)]
        near = [Link(server.accept()[0]) for _ in range(2)]
    names = ["a", "b", "c"]
    members = [
        MultiProcess(0, dict(enumerate(near, 1)), names),
        *(MultiProcess(index, {0: link}, names) for index, link in enumerate(far, 1)),
    ]
    yield members
    together([member.close for member in members])


def together(actions):
    found = [None] * len(actions)

    def run(index):
        found[index] = actions[index]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


class TestExchange:
    def test_arrays_go_to_the_first_and_come_back(self, three):
        arrays = [
            {"x": np.arange(6, dtype=np.int8).reshape(2, 3)},
            {"y": np.ones((), jnp.bfloat16), "empty": np.zeros((0, 4), np.float32)},
            {},
        ]
        wanted = [["empty"], ["x", "y"], []]
        missing = ["scale"]  # as a checkpoint in float32 has none

        def pass_on(member):
            own = {name: jnp.asarray(array) for name, array in arrays[member.index].items()}
            whole = exchange.gather(member, own)
            assert whole.keys() == ({"x", "y", "empty"} if member.first else set())
            return exchange.scatter(member, wanted[member.index] + missing, whole)

        given = together([lambda member=member: pass_on(member) for member in three])
        assert [sorted(each) for each in given] == [sorted(each) for each in wanted]
        for each in given:
            sent = arrays[0] | arrays[1]
            chex.assert_trees_all_equal(each, {name: sent[name] for name in each}, strict=True)

    @pytest.mark.parametrize("summed", [True, False])
    def test_metrics_of_all_blocks(self, three, summed):
        """The sum is that of the stages: in their order, in single precision; or the last one's."""
        losses = np.array([0.1, 0.7, 1e-7], np.float32)

        def merge(member):
            own = {"loss": 9.0, f"block_{member.index}/loss": losses[member.index]}
            if member.index == 1:
                own["block_1/accuracy"] = own["accuracy"] = np.float32(0.5)
            return exchange.merge_metrics(member, [own], summed=summed)

        (row,), *others = together([lambda member=member: merge(member) for member in three])
        assert others == [[], []]
        assert row["loss"] == ((losses[0] + losses[1]) + losses[2] if summed else 9.0)
        assert row["accuracy"] == row["block_1/accuracy"] == 0.5
        assert [row[f"block_{i}/loss"] for i in range(3)] == losses.tolist()

    def test_broadcast(self, three):
        value = [1, {"a": None}]
        found = together([lambda m=m: m.broadcast(value if m.first else None) for m in three])
        assert found == [value] * 3


class TestStops:
    @pytest.mark.parametrize("asks", [0, 1, 2])
    def test_all_stop_after_the_same_step(self, three, asks):
        begun = [0, 0, 0]

        def train(member):
            for step in range(1, 2000):
                begun[member.index] = step
                time.sleep(0.001 * (1 + 2 * member.index))
                if member.stops(step, requested=member.index == asks and step >= 5):
                    return step
            return None

        found = together([lambda member=member: train(member) for member in three])
        assert found == begun
        assert len(set(found)) == 1
        assert 5 <= found[0] < 100

    def test_one_that_waits_for_a_message_is_no_hindrance(self, three):
        """The last process is inside its second step until the others have stopped."""
        others = threading.Barrier(3)

        def train(member):
            for step in range(1, 2000):
                time.sleep(0.001)  # or one could be through before another begins
                if member.index == 2 and step == 2:
                    others.wait(600)
                if member.stops(step, requested=step >= 5):
                    if member.index != 2:
                        others.wait(600)
                    return step
            return None

        found = together([lambda member=member: train(member) for member in three])
        assert len(set(found)) == 1

    def test_nobody_stops_unasked(self, three):
        found = together([lambda m=m: [m.stops(step, False) for step in range(50)] for m in three])
        assert not any(any(each) for each in found)


def test_the_manifest_of_the_documents():
    """Every pod finds its place, and the first one by the name that Kubernetes gives it."""
    page = fences(ROOT / "docs" / "multi-host.md")
    (text,) = [fence.text for fence in page if fence.language == "yaml"]
    service, job = yaml.safe_load_all(text)
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed"
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert [entry["name"] for entry in container["env"]] == [token.VARIABLE]
    count = spec["completions"]
    assert spec["parallelism"] == count
    first = f"{name}-0.{pod['subdomain']}.default.svc.cluster.local"
    for index in range(count):
        words = [*container["command"], *container["args"]]
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in words]
        assert words[:2] == ["jdecouple", "train"]
        found = command_line.parse_process_spec(words[1:])
        assert (found.host, found.count, found.index) == (first, count, index)
        config, workdir = command_line.parse(words[1:])
        assert config.mesh.stages == count
        assert workdir.startswith(container["volumeMounts"][0]["mountPath"])
