# `make run` trains, exports and scores a small model on this machine; `make test` runs the tests. Both set
# everything up in .venv first. All paths are relative, so the folder's name may hold spaces.
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv/bin/python
PIP := $(VENV) -m pip --disable-pip-version-check

.PHONY: run data test test-slow test-gpu lint bench clean
.DELETE_ON_ERROR:

run: data
	RECIPE="$${RECIPE:-cpu}" $(VENV) train_gpt.py

data: .venv/run.stamp
	$(VENV) data/text.py

test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(VENV) -m pytest -q -n 2

test-slow: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(VENV) -m pytest -q -m slow

test-gpu: .venv/dev.stamp
	$(VENV) -m pytest -q -m gpu

lint: .venv/dev.stamp
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

bench: data
	$(VENV) records/bench.py

clean:
	rm -rf .venv runs data/datasets

.venv/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

# Without an NVIDIA driver, PyTorch's CPU wheels (200 MB, not 3 GB) are tried once; whatever happens, the
# requirements then come from the default index. `make TORCH_INDEX=<url>` names another index to try.
.venv/run.stamp: requirements.txt | .venv/venv.stamp
	@if ! command -v nvidia-smi >/dev/null && [ -n "$(TORCH_INDEX)" ]; then \
	  echo "no NVIDIA driver: trying PyTorch's CPU wheels"; \
	  $(PIP) install -q --no-deps --retries 0 --timeout 5 --index-url "$(TORCH_INDEX)" \
	    "$$(grep '^torch==' requirements.txt)" 2>/dev/null || echo "not there: taking the default index"; \
	fi
	$(PIP) install -q -r requirements.txt
	@touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(PIP) install -q -r requirements-dev.txt
	@touch $@
