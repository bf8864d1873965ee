# Recipes for everything that is done more than once. `just` itself comes with `python3 scripts/dev.py setup`,
# as .venv/bin/just.

set shell := ["bash", "-euo", "pipefail", "-c"]
set positional-arguments

# Once .venv is there its own Python goes on being used, whichever python3 comes first on the PATH.
python := if path_exists(justfile_directory() / ".venv/bin/python") == "true" { ".venv/bin/python" } else { "python3" }
bin := justfile_directory() / ".venv/bin"
export PATH := bin + ":" + env("PATH")

# list the recipes
default:
    @just --list --unsorted

# install the program and all tools into .venv
setup:
    @{{ python }} scripts/dev.py setup

# watch the daemon on a fake node with a fake kubelet
demo *arguments:
    @{{ python }} scripts/dev.py demo "$@"

# every check, and every test but the slow ones; arguments go to pytest
test *arguments:
    @{{ python }} scripts/dev.py test "$@"

# only pytest, as in: just pytest -k cdi
pytest *arguments: setup
    pytest "$@"

# ruff, mypy, the layers, and whether the generated code is current
lint:
    @{{ python }} scripts/dev.py lint

# format the code and fix what ruff can fix
format: setup
    ruff check --fix-only --quiet .
    ruff format .

# what CI runs
ci:
    .ci/run

# make requirements/*.txt again from pyproject.toml, keeping versions where they still fit
lock: setup
    scripts/lock.sh

# make requirements/*.txt again with the newest versions
upgrade: setup
    UPGRADE=1 scripts/lock.sh

# make sandbox_plugin/api again from protos/
generate-api: setup
    python scripts/generate-api.py

# make the table of model names again from Debian's newest pci.ids, or from a file
pci-names *file: setup
    python scripts/generate-pci-names.py "$@"

# make the tables of docs/consumers.md from runs
consumers: setup
    python scripts/show-consumers.py

# print the alerts as Prometheus' rule_files take them; --runbooks ADDRESS comes before each runbook's path
alerts *arguments: setup
    @python scripts/plain-alerts.py "$@"

# alerts and dashboard by promtool; then metrics, and each alert as it fires and resolves, in a real Prometheus
test-monitoring: setup
    scripts/install-prometheus.sh
    PROMTOOL=required pytest tests/test_alerts.py tests/test_dashboard.py
    python scripts/try-metrics.py
    python scripts/try-alerts.py

# make the reference of docs/monitoring.md from the code
metrics-reference: setup
    python scripts/metrics-reference.py

# print what a cluster gets from an overlay
manifests overlay="kata": setup
    kubectl kustomize manifests/overlays/{{ overlay }}

# `just test` in a fresh clone as an ordinary user; for root
test-as-user *arguments:
    @scripts/test-as-user.sh "$@"

# a real Prometheus scrapes the daemon while the demo's story plays
test-metrics: setup
    scripts/install-prometheus.sh
    python scripts/try-metrics.py

# the daemon on a real kernel in QEMU; docs/vm-test.md
test-vm *arguments:
    scripts/test-vm.sh "$@"

# the same on a kernel with VFIO cdevs, which is built from Debian's sources first; not in CI
test-vm-cdev:
    scripts/build-cdev-kernel.sh
    scripts/test-vm.sh --cdevs

# With Hypothesis's profile "ci" the examples are the same each time, and slow ones are no fault.
# lines and branches that no test reaches, the daemon's processes included; no more than pyproject.toml allows
coverage: setup
    rm -rf .cache/coverage
    coverage run -m pytest -n 4 --dist worksteal --hypothesis-profile=ci
    coverage combine --quiet
    coverage report

# random events on a fake node against an independent reading of it, for longer than the tests do
truth examples="100" steps="100": setup
    TRUTH_EXAMPLES={{ examples }} TRUTH_STEPS={{ steps }} pytest tests/test_truth.py

# random pods, VMs, binds and restarts against the pure middle, for longer than the tests do: nothing is in two hands
one-holder steps="200000": setup
    ONE_HOLDER_STEPS={{ steps }} pytest -n 2 tests/test_one_holder.py

# the tests that `just test` leaves out because they take long, and 100 kubelet restarts
test-slow: setup
    pytest -n 2 -m slow
    KUBELET_RESTARTS=100 pytest -k many_kubelet_restarts

# restarts, flapping devices and Allocates at random; at the end nothing may have grown
soak seconds="600": setup
    python scripts/soak.py --seconds {{ seconds }}

# fuzz what reads foreign input, for so many seconds each
fuzz seconds="60":
    scripts/fuzz.sh {{ seconds }}

# the figures and the plot of docs/topology.md
simulate *arguments: setup
    python scripts/simulate-allocation.py "$@"

# how fast it is where somebody waits, and what it costs when nobody does
bench *arguments: setup
    python scripts/bench.py "$@"

# the diagrams of docs/, and the plot of what `just bench --json docs/performance.json` wrote
pictures: setup
    python scripts/draw-diagrams.py
    python scripts/plot-performance.py

# docs/demo.svg: the demo on a terminal, recorded
record-demo *arguments: setup
    python scripts/record-demo.py "$@"

# how long preferred allocation takes
bench-prefer *arguments: setup
    python scripts/bench-prefer.py "$@"

# build the wheel into dist/
wheel: setup
    python -m hatchling build --target wheel

# build the image with buildah and try it; --debootstrap needs no registry, --twice compares two builds
image *arguments:
    scripts/build-image.sh "$@"

# pin the Containerfile's base image to the digest that its tag has now; asks the registry
pin-base *image:
    @{{ python }} scripts/pin-base.py "$@"

# write the version wherever it is named, or only say it; --release dates the changelog
set-version *arguments:
    @{{ python }} scripts/set-version.py "$@"

# make THIRD-PARTY-NOTICES.md again from the lock
notices: setup
    python scripts/generate-notices.py

# sdist and wheel, the demo and the sdist's tests with the wheel in an empty environment; arguments go to pytest
release-check *arguments: setup
    scripts/release-check.sh "$@"

# remove what the other recipes leave behind, .venv included
clean:
    rm -rf .cache .venv .venv.lock dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
