# Every target makes .venv and installs what it needs first: see .ci/setup.
.PHONY: help demo test reliability pictures lint bench deb format lock proto clean
.DEFAULT_GOAL := help
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
BIN := .venv/bin

help:
	@echo "make demo    the whole product in two network namespaces: it takes 20 s, once all is installed"
	@echo "make test    every test, the kernel's under QEMU where needed, 25 to 55 minutes"
	@echo "make reliability  every fault at full size; writes docs/reliability.md"
	@echo "make pictures  the pictures of the documentation anew, from a real run; writes docs/pictures/"
	@echo "make lint    ruff, mypy --strict, import contracts"
	@echo "make bench   the agent beside wg at 10,000 to 100,000 peers, about an hour; writes build/bench.json"
	@echo "make docs    docs/configuration.md and docs/man/wg-agent.toml.5 anew from the model"
	@echo "make deb     the Debian package, dist/wg-agent_VERSION_ARCH.deb"
	@echo "make format  let ruff format and fix what it can"
	@echo "make lock    requirements/*.txt anew from pyproject.toml"
	@echo "make proto   the modules of Defguard's messages anew from their .proto files"

demo:
	@.ci/setup demo
	@.ci/as-root $(BIN)/wg-agent demo

# ARGS="tests/kernel -k revoke" runs a part, and then nothing judges the coverage.
test:
	@.ci/setup test
	@.ci/as-root $(BIN)/$(if $(ARGS),pytest $(ARGS),coverage run -m pytest)

# The whole matrix of faults; it takes about an hour, and two where the kernel has to be emulated.
# With ARGS a part of it is run anew, and the others' lines stay as they were seen last.
reliability:
	@.ci/setup test
	@$(if $(ARGS),,rm -f .cache/reliability.json)
	@RELIABILITY=full .ci/as-root $(BIN)/pytest -m reliability \
		--reliability-report=docs/reliability.md $(ARGS)

# Each line draws some of docs/pictures anew.
pictures:
	@.ci/setup test
	@.ci/as-root $(BIN)/python -m tests.pictures.screens $(ARGS)
	@$(if $(ARGS),,.ci/as-root $(BIN)/python -m tests.pictures.dashboard)

lint:
	@.ci/setup lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict agent tests docs/reference.py
	$(BIN)/lint-imports

# Files named bench_*.py hold benchmarks; pytest by itself does not collect them.
# BENCH_ONLY="grant_10k idle_cpu_10k" measures some of the figures; see tests/bench/__main__.py.
bench:
	@.ci/setup bench
	@.ci/as-root $(BIN)/pytest -o python_files='bench_*.py' --timeout=0 --benchmark-only tests/bench
	@.ci/as-root $(BIN)/python -m tests.bench

# What a key means stands in config.example.toml, all else in agent/config.py.
.PHONY: docs
docs:
	@.ci/setup lint
	@$(BIN)/python -m docs.reference

deb:
	@.ci/setup deb
	@.ci/deb

format:
	@.ci/setup lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Index settings are the user's own and stay out of the files.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header pyproject.toml
lock:
	@.ci/setup lint
	$(LOCK) -o requirements/runtime.txt
	$(LOCK) --all-extras --group dev -o requirements/dev.txt
	$(LOCK) --extra defguard --extra sandbox -c requirements/dev.txt -o requirements/package.txt

# The paths in them are imported by, hence the root.
WIRE := agent/core/defguard/wire
proto:
	@.ci/setup lint
	rm -f $(WIRE)/*_pb2.py $(WIRE)/*_pb2.pyi
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. $(WIRE)/*.proto

clean:
	rm -rf .venv .cache .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks build dist
