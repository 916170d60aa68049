"""`r2ec-fast serve`; its docstring is the help of its settings."""

from __future__ import annotations

from functools import partial


def serve(
    model: str,
    *,
    data: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str | None = None,
    api_key_file: str | None = None,
    items_log: str | None = "",
    max_batch_tokens: int = 8192,
    max_cache_tokens: int = 32768,
    max_wait_ms: float = 0.0,
    max_queue: int = 1024,
    timeout_s: float | None = None,
    cache_entries: int = 10_000,
    cache_seconds: float = 3600.0,
    table_copies: int = 2,
    engine: str = "transformers",
    drain_seconds: float = 30.0,
) -> None:
    """Serve a model over HTTP: recommendations with reasonings, a live catalog, a page to try it.

    Args:
        model: directory that a training run exported.
        data: prepared data set (directory), to recommend to its users by id.
        host: address to listen at; 0.0.0.0: all of the machine's.
        port: port to listen at; 0: any free one, which is printed.
        served_model_name: the model's name in answers; default: the directory's.
        api_key_file: file of keys, one a line; requests must then bring one of them.
        items_log: file that keeps changes of items; default: item_changes.log beside the item
            table. null: changes are lost with the process.
        max_batch_tokens: of a pass over prompts.
        max_cache_tokens: of all reasonings under way together.
        max_wait_ms: how long an idle server waits for company for a direct request.
        max_queue: requests that wait; more are refused (429).
        timeout_s: of a request that names none; null: no limit.
        cache_entries: user states that are kept.
        cache_seconds: how long they are kept.
        table_copies: 2; or 1 for half of the table's memory: searches then wait for changes.
        engine: what writes reasonings: transformers, or vllm:http://HOST:PORT, a vLLM server of the
            same weights.
        drain_seconds: most time to answer what is under way after SIGTERM.
    """
    from r2ec_fast.serve.numerics import ask_for_strict_products

    ask_for_strict_products()
    try:
        from r2ec_fast.serve.http.guard import State, read_keys
        from r2ec_fast.serve.http.metrics import Metrics
        from r2ec_fast.serve.http.server import run
    except ImportError as error:
        raise ImportError(f"serve needs {error.name}: pip install 'r2ec-fast[serve]'") from error
    from r2ec_fast.serve.catalog.table import LocalTable
    from r2ec_fast.serve.http.app import create_app
    from r2ec_fast.serve.service import Service
    from r2ec_fast.serve.worker import WorkerSettings

    keys = [] if api_key_file is None else read_keys(api_key_file)
    metrics, state = Metrics(), State()
    service = Service.from_pretrained(
        model,
        name=served_model_name,
        data=data,
        items_log=items_log,
        settings=WorkerSettings(max_batch_tokens, max_cache_tokens, max_wait_ms / 1e3, max_queue),
        cache_entries=cache_entries,
        cache_seconds=cache_seconds,
        table=partial(LocalTable, copies=table_copies),
        engine=engine,
        observe=metrics.observe,
    )
    app = create_app(service, metrics=metrics, state=state, keys=keys, timeout=timeout_s)
    try:
        run(app, state, host=host, port=port, drain_seconds=drain_seconds)
    finally:
        service.close()
