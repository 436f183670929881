# SPDX-License-Identifier: Apache-2.0
# make demo: watch the simulated arm work. make test: everything that must hold.
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.quantvla-ready
export ROS_AUTOMATIC_DISCOVERY_RANGE = LOCALHOST

.PHONY: demo test lint venv clean

demo: $(STAMP)
	$(PY) -m quantvla_ros demo

test: lint
	bash .ci/arm-tools
	bash .ci/triton-tools $(PY)
	$(PY) -m pytest

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

venv: $(STAMP)

$(STAMP): constraints.txt setup.py .ci/bootstrap
	bash .ci/bootstrap $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build install log
