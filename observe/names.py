"""Every span, attribute and metric by name. OpenTelemetry's GenAI conventions where they have a word, else "baton."."""

# Spans. The root of a request is "<operation> <model>".
OPERATION_CHAT = "chat"
OPERATION_TEXT = "text_completion"
SPAN_TOKENISE = "tokenise"  # router
SPAN_PLACE = "place"  # router: waiting for and choosing workers
SPAN_QUEUE = "queue"  # worker: admitted, not yet in a batch
SPAN_PREFILL = "prefill"  # prefill worker: first chunk to first token
SPAN_OFFER = "kv_offer"  # prefill worker: first piece announced to the last release
SPAN_RESERVE = "kv_reserve"  # decode worker: reserved to first piece
SPAN_TRANSFER = "kv_transfer"  # decode worker: first piece to commit
SPAN_DECODE = "decode"  # decode worker: joined the batch to the end

# Attributes of the GenAI conventions.
GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE = "gen_ai.request.temperature"
GEN_AI_REQUEST_TOP_P = "gen_ai.request.top_p"
GEN_AI_REQUEST_TOP_K = "gen_ai.request.top_k"
GEN_AI_REQUEST_PRESENCE = "gen_ai.request.presence_penalty"
GEN_AI_REQUEST_FREQUENCY = "gen_ai.request.frequency_penalty"
GEN_AI_REQUEST_SEED = "gen_ai.request.seed"
GEN_AI_REQUEST_STOP = "gen_ai.request.stop_sequences"
GEN_AI_REQUEST_CHOICES = "gen_ai.request.choice.count"
GEN_AI_RESPONSE_ID = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL = "gen_ai.response.model"
GEN_AI_RESPONSE_FINISH = "gen_ai.response.finish_reasons"
GEN_AI_RESPONSE_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"  # seconds
GEN_AI_USAGE_INPUT = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT = "gen_ai.usage.output_tokens"
GEN_AI_USAGE_CACHED = "gen_ai.usage.cache_read.input_tokens"
ERROR_TYPE = "error.type"  # name of an error in core/errors.py

PROVIDER = "baton"

# Attributes of our own.
REQUEST_ID = "baton.request.id"
SEQUENCE_ID = "baton.sequence.id"
WORKER_ID = "baton.worker.id"
WORKER_ROLE = "baton.worker.role"
PREFILL_WORKER = "baton.prefill.worker"
DECODE_WORKER = "baton.decode.worker"
TOKENS = "baton.tokens"
STEPS = "baton.steps"
TICKET_ID = "baton.ticket.id"
TRANSFER_BYTES = "baton.transfer.bytes"
TRANSFER_BLOCKS = "baton.transfer.blocks"
TRANSFER_PIECES = "baton.transfer.pieces"
TRANSFER_GB_PER_S = "baton.transfer.gb_per_s"
TRANSFER_TRANSPORT = "baton.transfer.transport"

# Metrics of a router.
ROUTER_REQUESTS = "baton_router_requests_total"  # by outcome
ROUTER_IN_FLIGHT = "baton_router_requests_in_flight"
ROUTER_QUEUED = "baton_router_requests_queued"
ROUTER_DURATION = "baton_router_request_seconds"
ROUTER_FIRST_TOKEN = "baton_router_time_to_first_token_seconds"  # noqa: S105 (no password)
ROUTER_INTER_TOKEN = "baton_router_inter_token_seconds"  # noqa: S105
ROUTER_TOKENS = "baton_router_tokens_total"  # by kind: prompt, cached, completion
ROUTER_WORKERS = "baton_router_workers"  # linked, by role

# Metrics of a worker.
WORKER_STEPS = "baton_worker_steps_total"
WORKER_STEP = "baton_worker_step_seconds"
WORKER_DEVICE = "baton_worker_device_seconds_total"  # by state: busy, idle
WORKER_BATCH = "baton_worker_batch_sequences"
WORKER_TOKENS = "baton_worker_tokens_total"  # by kind: sampled, prefill, cached
WORKER_SEQUENCES = "baton_worker_sequences"  # by state: running, waiting
WORKER_WAITING_TOKENS = "baton_worker_waiting_tokens"
WORKER_BLOCKS = "baton_worker_blocks"  # by state: free, cached, held, lent
WORKER_UNUSED_SLOTS = "baton_worker_unused_slots"  # internal fragmentation, in tokens
WORKER_PREEMPTIONS = "baton_worker_preemptions_total"  # by kind: swap, recompute
WORKER_SWAP_BYTES = "baton_worker_swap_bytes_total"
WORKER_TRANSFERS = "baton_worker_transfers_total"  # by transport, as the next two
WORKER_TRANSFER_BYTES = "baton_worker_transfer_bytes_total"
WORKER_TRANSFER_SECONDS = "baton_worker_transfer_seconds_total"
WORKER_TRANSFER_RATE = "baton_worker_transfer_gb_per_s"
