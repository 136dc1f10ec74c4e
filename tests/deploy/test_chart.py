"""The chart by real Helms: what it renders is valid; what is wrong is refused with the reason."""

from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

from scripts import chart
from tests.deploy import crd
from tests.deploy.chart import (
    ALERTS,
    CHART,
    KEYS,
    VALUES,
    Document,
    Helm,
    of_kind,
    parsed,
    pods,
    serve_config,
)

VAULT = {"shards": 2, "memory_bytes": 1 << 30}
GPUS = {"device": "cuda", "engine": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}
EXPOSED = {
    "ingress": {"enabled": True, "host": "llm.example.org", "tlsSecret": "llm"},
    "gateway": {
        "enabled": True,
        "parentRefs": [{"name": "public"}],
        "hostnames": ["llm.example.org"],
    },
}


def _gpus(count: int, *kinds: str) -> dict[str, Any]:
    return {"resources": {"limits": dict.fromkeys(kinds or ("nvidia.com/gpu",), count)}}


def _engines(*kinds: str) -> dict[str, Any]:
    """One of each kind for every engine."""
    return {"prefill": _gpus(1, *kinds), "decode": _gpus(1, *kinds)}


MIG = "nvidia.com/mig-3g.40gb"


# Each way to set something that changes what is rendered.
MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no prefill": {"config": {"prefill": {"replicas": 0}}},
    "vault": {"config": {"tiers": {"vault": VAULT}}},
    "GPUs": {"config": GPUS, "groups": {"prefill": _gpus(4), "decode": _gpus(4)}},
    "partitions of GPUs": {"config": {"device": "cuda"}, "groups": _engines(MIG)},
    "rdma": {"rdma": {"enabled": True}, "config": {"tiers": {"vault": VAULT}}},
    "exposed": {"expose": EXPOSED},
    "secrets": {"secrets": {"cluster": "c", "ray": "r", "huggingFace": "h", "tls": "t"}},
    "claim": {"cache": {"create": True, "storageClass": "fast"}},
    "own claim": {"cache": {"claim": "models"}},
    "open": {"networkPolicy": {"enabled": False}},
    "closed": {"networkPolicy": {"clients": [{"podSelector": {}}], "downloads": False}},
    "monitoring": {"monitoring": {"podMonitors": True, "rules": True, "dashboards": True}},
    "placed": {
        "groups": {
            "decode": {
                "nodeSelector": {"gpu": "h200"},
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "priorityClassName": "serving",
                "annotations": {"team": "inference"},
                "env": [{"name": "UCX_NET_DEVICES", "value": "mlx5_0:1"}],
            }
        }
    },
    "redis": {"redis": {"address": "redis.data:6380", "secret": "redis"}},
    "own account": {"serviceAccount": {"name": "mine"}, "image": {"pullSecrets": [{"name": "p"}]}},
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a typing error": ({"config": {"router": {"polcy": "breakeven"}}}, "polcy"),
    "a wrong type": ({"config": {"decode": {"replicas": "two"}}}, "replicas"),
    "a negative count": ({"config": {"prefill": {"replicas": -1}}}, "replicas"),
    "no such policy": ({"config": {"router": {"policy": "fastest"}}}, "policy"),
    "what the chart sets": ({"config": {"host": "10.0.0.1"}}, "host"),
    "an unknown value": ({"grops": {}}, "grops"),
    "an unknown group": ({"groups": {"router": {}}}, "router"),
    "a size that is none": ({"groups": {"decode": {"shm": "plenty"}}}, "shm"),
    "no host": ({"expose": {"ingress": {"enabled": True}}}, "expose.ingress.host"),
    "no decode": ({"config": {"decode": {"replicas": 0}}}, "replicas"),
    "peers without memory": ({"config": {"tiers": {"peer": {}}}}, "set config.tiers.host.bytes"),
    "no GPU": ({"config": {"device": "cuda"}}, "set nvidia.com/gpu there to 1"),
    "too few GPUs": (
        {"config": GPUS, "groups": {"prefill": _gpus(2), "decode": _gpus(4)}},
        "groups.prefill.resources.limits has 2 GPUs",
    ),
    "two kinds of GPUs, of which KubeRay takes one": (
        {"config": {"device": "cuda", "engine": {"tensor_parallel_size": 2}},
         "groups": _engines("nvidia.com/mig-1g.10gb", MIG)},
        "groups.prefill.resources.limits has 1 GPUs",
    ),
    "partitions that KubeRay does not take": (
        {"config": {"device": "cuda"}, "groups": _engines("nvidia.com/mig-1g.10gb.me")},
        "groups.prefill.resources.limits has 0 GPUs",
    ),
    "too many catalogues": (
        {"config": {"catalogue": {"replicas": 3}, "ingress": {"replicas": 2}}},
        "set it to config.ingress.replicas, 2, at most",
    ),
    "more cores than a pod": ({"config": {"decode": {"cpus": 65}}}, "set 64 at most"),
    "more cores than an ingress": ({"config": {"ingress": {"cpus": 63.75}}}, "64.25 cores"),
    "a model for each pod": ({"config": {"model": "default"}}, "cache.create=true"),
    "a share of pods": ({"groups": {"decode": {"maxUnavailable": "25%"}}}, "maxUnavailable"),
    "no port of Redis": ({"redis": {"address": "redis"}}, "address"),
}  # fmt: skip


@pytest.fixture(scope="session")
def schemas() -> dict[tuple[str, str], crd.Schema]:
    found = crd.folder()
    if found is None:
        pytest.skip("KubeRay's definitions are not in shared/data/kuberay, here or beside")
    return crd.read(found)


def _check(documents: list[Document], schemas: dict[tuple[str, str], crd.Schema]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="requirements/deploy.txt has it")
    for each in documents:
        if (each["apiVersion"], each["kind"]) in schemas:
            assert crd.complaints(each, schemas) == []
        elif not each["apiVersion"].startswith(("monitoring.coreos.com", "gateway.")):
            kubernetes.validate(each, "1.33", strict=True)
    ServeDeploySchema.model_validate(serve_config(documents))


def test_lint_has_nothing_to_say(helm: Helm) -> None:
    """Strictly, for the defaults and for each file of values."""
    for file in VALUES.values():
        done = helm.run("lint", "--strict", str(CHART), "--set", KEYS[0], "-f", str(file))
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", VALUES)
def test_what_comes_along_renders_valid_resources(
    helm: Helm, name: str, schemas: dict[tuple[str, str], crd.Schema]
) -> None:
    """By Kubernetes' schemas, KubeRay's, and Serve's own."""
    _check(helm.documents(name), schemas)


@pytest.mark.parametrize("case", MATRIX)
def test_each_value_renders_valid_resources(
    helm: Helm, case: str, schemas: dict[tuple[str, str], crd.Schema]
) -> None:
    """The same for each way to set something."""
    _check(helm.documents(more=MATRIX[case]), schemas)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused_by_name(helm: Helm, case: str) -> None:
    """Before anything is sent to a cluster."""
    values, named = WRONG[case]
    done = helm.template(more=values)
    assert done.returncode != 0
    assert named in done.stderr


def test_a_missing_secret_is_refused_with_the_remedy(helm: Helm) -> None:
    """Pods answer beyond loopback, so there are keys."""
    done = helm.template(sets=())
    assert done.returncode != 0
    assert "kubectl create secret generic breakeven-keys" in done.stderr


def test_pods_are_confined(helm: Helm) -> None:
    """No root, no writable image, no capability but the one that RDMA needs, no token of
    Kubernetes; what they share with others of the node is bounded."""
    for group, pod in pods(helm.documents("racks")).items():
        spec = pod["spec"]
        [container] = spec["containers"]
        inner = container["securityContext"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["automountServiceAccountToken"] is False
        assert inner["readOnlyRootFilesystem"]
        assert not inner["allowPrivilegeEscalation"]
        with_rdma = group in ("prefill", "decode", "vault")
        assert inner["capabilities"] == {
            "drop": ["ALL"], **({"add": ["IPC_LOCK"]} if with_rdma else {})
        }  # fmt: skip
        assert ("rdma/ib" in container["resources"]["limits"]) == with_rdma
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/dev/shm", "/tmp", "/var/cache/breakeven"} <= mounted


def test_budgets_say_how_many_pods_are_to_stay(helm: Helm) -> None:
    """In whole pods, since Kubernetes cannot ask a RayCluster for its scale; a group of one has no
    budget, so that its node can be drained, unless that is asked for. Pods that are not ready hold
    no drain up: they may be evicted, however many of their group are ready."""
    assert _stay(helm.documents("racks")) == {"ingress": 3, "prefill": 6, "decode": 14, "vault": 3}
    assert _stay(helm.documents("cpu")) == {}
    kept = {"groups": {"head": {"maxUnavailable": 0}, "prefill": {"maxUnavailable": 9}}}
    assert _stay(helm.documents("gpu-1x8", more=kept)) == {"head": 1, "ingress": 1, "decode": 3}


def _stay(documents: list[Document]) -> dict[str, int]:
    """Pods that each group's budget keeps, by the label that the group's pods have."""
    kept = {}
    for budget in of_kind(documents, "PodDisruptionBudget"):
        assert set(budget["spec"]) == {"minAvailable", "unhealthyPodEvictionPolicy", "selector"}
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        wanted = budget["spec"]["selector"]["matchLabels"]
        [group] = (
            name
            for name, pod in pods(documents).items()
            if wanted.items() <= pod["metadata"]["labels"].items()
        )
        kept[group] = budget["spec"]["minAvailable"]
    return kept


def test_kuberay_finds_its_head(helm: Helm) -> None:
    """Its Services select pods by app.kubernetes.io/name, which it gives them itself; a label with
    the chart's version would start a second cluster. Where a head lists ports it wants Serve's."""
    groups = pods(helm.documents("racks"))
    for group, pod in groups.items():
        assert pod["metadata"]["labels"] == {"breakeven/release": "test", "breakeven/group": group}
    [container] = groups["head"]["spec"]["containers"]
    assert {"name": "serve", "containerPort": 8000} in container["ports"]


def test_every_port_of_metrics_is_scraped(helm: Helm) -> None:
    """By its name, and the NetworkPolicy opens it."""
    documents = helm.documents("racks")
    [monitor], [policy] = of_kind(documents, "PodMonitor"), of_kind(documents, "NetworkPolicy")
    scraped = {each["port"] for each in monitor["spec"]["podMetricsEndpoints"]}
    ports = {
        port["containerPort"]
        for pod in pods(documents).values()
        for port in pod["spec"]["containers"][0]["ports"]
        if port["name"] in scraped
    }
    opened = [{port["port"] for port in each["ports"]} for each in policy["spec"]["ingress"]]
    assert ports == {8080, 44217, 44227, 8000, 9464, 9465}
    assert ports in opened


def test_no_port_of_metrics_is_one_that_nobody_answers(helm: Helm) -> None:
    """It would be a target that is down for ever. Each ingress pod has a catalogue; where somebody
    wants fewer, nobody can say which pods have one, and none is scraped."""
    for catalogue, count, scraped in (
        ({}, 3, True),
        ({"cpus": 2}, 3, True),
        ({"replicas": 3}, 3, True),
        ({"replicas": 1}, 1, False),
    ):
        config = {"ingress": {"replicas": 3}, "catalogue": catalogue}
        documents = helm.documents(more={"config": config})
        [application] = serve_config(documents)["applications"]
        assert application["args"]["catalogue"]["replicas"] == count
        named = {port["name"] for port in _ports(documents, "ingress")}
        assert ("breakeven" in named) == scraped


def test_a_target_is_an_ingress_by_the_labels_that_its_alert_asks_for(helm: Helm) -> None:
    """The group is that of the pod's label, and `endpoint` the port's name, as Prometheus'
    operator gives it; no other group has a port of that name."""
    documents = helm.documents("racks")
    [monitor] = of_kind(documents, "PodMonitor")
    [scraped] = (e for e in monitor["spec"]["podMetricsEndpoints"] if e["port"] == "http")
    labels = {each["targetLabel"]: each["sourceLabels"] for each in scraped["relabelings"]}
    assert labels == {
        "group": ["__meta_kubernetes_pod_label_breakeven_group"],
        "ray_io_cluster": ["__meta_kubernetes_pod_label_ray_io_cluster"],
    }
    [group] = (
        pod["metadata"]["labels"]["breakeven/group"]
        for name, pod in pods(documents).items()
        if "http" in {port["name"] for port in _ports(documents, name)}
    )
    assert f'(up{{group="{group}", endpoint="http"}}) == 0' in ALERTS.read_text()


def _ports(documents: list[Document], group: str) -> list[dict[str, Any]]:
    [container] = pods(documents)[group]["spec"]["containers"]
    ports: list[dict[str, Any]] = container["ports"]
    return ports


def test_redis_keeps_the_books_of_the_head(helm: Helm) -> None:
    """It can be reached, and its password stays in its Secret."""
    documents = helm.documents(more=MATRIX["redis"])
    [service], [policy] = of_kind(documents, "RayService"), of_kind(documents, "NetworkPolicy")
    password = {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    assert service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis.data:6380", "redisPassword": password,
    }  # fmt: skip
    assert {"ports": [{"port": 6380}]} in policy["spec"]["egress"]


def test_the_service_says_how_it_is_asked(helm: Helm) -> None:
    """To those in front of it: they would ask a port with TLS in clear."""
    for sets, scheme in ((KEYS, "http"), ((*KEYS, "secrets.tls=t"), "https")):
        [service] = of_kind(helm.documents(sets=sets), "Service")
        [port] = service["spec"]["ports"]
        assert (port["name"], port["appProtocol"]) == (scheme, scheme)


def test_every_group_has_probes(helm: Helm) -> None:
    """Those of its own: an ingress is ready once it has a working path."""
    for group, pod in pods(helm.documents("racks")).items():
        [container] = pod["spec"]["containers"]
        named = {port["name"] for port in container["ports"]}
        ready = container["readinessProbe"]["httpGet"]
        assert ready["port"] in named
        assert container["livenessProbe"]["httpGet"]["port"] in named
        assert (ready["path"] == "/readyz") == (group == "ingress")
        assert ("lifecycle" in container) == (group != "head")


def test_manifests_are_what_the_chart_renders(helm: Helm) -> None:
    """`make chart` writes k8s/; both Helms render the same, but for its order and empty lines."""
    for path, text in chart.manifests(helm.program).items():
        kept, made = (sorted(parsed(each), key=str) for each in (path.read_text(), text))
        assert kept == made, f"{path.name}: run `make chart`"
