"""Ports: found in rows, held against other launchers, and errors that say who has them."""

from __future__ import annotations

import os
import socket

import pytest
import zmq

from kvrouter.vllm import ports


def listen(port: int = 0) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen(1)
    return server


def test_find_free_ports_held_ports_are_not_found_twice():
    held = [ports.find_free_ports(50) for _ in range(8)]
    try:
        numbers = [held_range[index] for held_range in held for index in range(50)]
        assert len(set(numbers)) == 400
        assert all(1024 <= number <= 65535 for number in numbers)
    finally:
        for held_range in held:
            held_range.release()


def test_find_free_ports_held_port_can_be_bound_by_the_worker():
    held = ports.find_free_ports(2)
    context = zmq.Context()
    publisher = context.socket(zmq.PUB)
    try:
        publisher.bind(f"tcp://*:{held[0]}")
        listen(held[1]).close()
    finally:
        publisher.close(linger=0)
        context.term()
        held.release()


def test_reserve_ports_taken_port_names_port_setting_and_process():
    base = ports.find_free_ports(3)
    base.release()
    with listen(base[2]), pytest.raises(ports.PortTakenError) as caught:
        ports.reserve_ports(base[0], 3, "base_kv_events_port")
    message = str(caught.value)
    assert f"port {base[2]} (base_kv_events_port + 2) is taken by" in message
    assert f"(pid {os.getpid()})" in message
    # The ports before it are free again.
    ports.reserve_ports(base[0], 2, "base_kv_events_port").release()


def test_reserve_ports_port_of_a_server_just_closed_is_free():
    server = listen()
    port = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    connection, _ = server.accept()
    # The side that closes first keeps the port in TIME_WAIT.
    connection.close()
    client.close()
    server.close()
    ports.reserve_ports(port, 1, "base_http_port").release()


@pytest.mark.parametrize("base", [0, -1, 65536, 65535])
def test_reserve_ports_out_of_range_names_the_setting(base):
    with pytest.raises(ValueError, match="base_metrics_port"):
        ports.reserve_ports(base, 2, "base_metrics_port")


def test_port_holder_of_a_free_port_is_none():
    free = ports.find_free_ports(1)
    free.release()
    assert ports.port_holder(free[0]) is None
