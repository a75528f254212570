"""See tests/kv_machine.py; `make fuzz` takes 200,000 steps of the same."""

from hypothesis import HealthCheck, settings

from ...kv_machine import KvMachine

TestKvMachine = KvMachine.TestCase
TestKvMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
