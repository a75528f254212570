from baton.engine.memory import cpu_kv_bytes, free_memory, kv_room, usable_bytes

MIB, GIB = 1 << 20, 1 << 30


def test_free_memory_is_positive() -> None:
    assert free_memory() > 0


def test_engines_share_a_part_of_what_is_free_within_bounds() -> None:
    assert cpu_kv_bytes(2 * GIB, MIB) == 512 * MIB
    assert cpu_kv_bytes(2 * GIB, MIB, engines=2) == 256 * MIB
    assert cpu_kv_bytes(100 * GIB, MIB) == GIB
    assert cpu_kv_bytes(-GIB, MIB) == 64 * MIB


def test_one_request_of_full_length_always_fits() -> None:
    assert cpu_kv_bytes(2 * GIB, 3 * GIB) == 3 * GIB


def test_a_gpu_s_room_for_kv_is_what_its_share_leaves_beside_weights_and_workspace() -> None:
    assert kv_room(usable_bytes(80 * GIB), 12 * GIB) == 59 * GIB
    assert kv_room(usable_bytes(80 * GIB, share=0.5), 36 * GIB) == -1 * GIB
