"""The settings of ``[agent.NAME]``: rows of the key table (see keys.py)."""

from katashim.config.keys import U64, choice, flag, number, section, text, words

AGENT = section("agent", {
    "The agent in the guest": [
        flag("enable_debug", "Let the agent log at debug level.", done=True),
        choice("log_level", "info", "trace debug info warn error critical",
               "Level of the agent's messages in the shim's log.", synonyms={"warning": "warn"}),
        flag("enable_tracing", "Let the agent make OpenTelemetry spans.", done=True, annotation=True),
        flag("debug_console_enabled", "A root shell in the guest on vsock port 1026.", done=True),
        flag("visible_cdi_devices", "Show CDI devices to containers.", done=True),
        words("kernel_modules", "Modules for the guest to load, each with its parameters: "
              "`i915 enable_ppgtt=0`.", done=True, annotation=True),
        number("container_pipe_size", 0, "Bytes of a container's stdio pipes in the guest; 0 leaves the "
               "kernel's size.", done=True, annotation=True),
        number("launch_process_timeout", 0, "Seconds the agent waits for its helper processes to start; "
               "0 leaves its own.", done=True),
        text("policy", "A policy (rego) for the agent to enforce.", done=True, annotation=True),
    ],
    "Reaching the agent": [
        number("server_port", 1024, "The agent's vsock port.", low=1),
        number("log_port", 1025, "vsock port of the agent's log.", low=1),
        number("passfd_listener_port", 1027, "vsock port of the agent's fd passthrough.", low=1),
        number("dial_timeout_ms", 10, "Milliseconds between two of Kata's attempts to connect. katashim "
               "connects as soon as the agent listens; here it is the least for `reconnect_timeout_ms`.",
               low=1, done=True),
        number("reconnect_timeout_ms", 3000, "Milliseconds to keep trying to reach the agent. katashim "
               "waits for the longer of this and `boot_timeout_s`.", done=True),
        number("create_container_timeout", 30, "Seconds that the agent may take to create a container, "
               "and the time limit of its other calls.", low=1, done=True),
        number("health_check_request_timeout_ms", 90000, "Milliseconds that a health check may take.",
               low=1, done=True),
        number("cdh_api_timeout_ms", 50000, "Milliseconds that the confidential data hub may take.",
               low=1, done=True, annotation=True),
    ],
})

MEM_AGENT = section("agent.mem_agent", {
    "The guest's memory agent": [
        flag("mem_agent_enable", "Run it.", done=True),
        flag("memcg_disable", "Do not age and evict pages.", done=True),
        flag("memcg_swap", "Evict anonymous pages to swap too.", done=True),
        number("memcg_swappiness_max", 50, "Highest swappiness.", high=200, done=True),
        number("memcg_period_secs", 600, "Seconds between two rounds.", high=U64, done=True),
        number("memcg_period_psi_percent_limit", 1, "Skip a round above this pressure, percent.", high=100,
               done=True),
        number("memcg_eviction_psi_percent_limit", 1, "Stop evicting above this pressure, percent.",
               high=100, done=True),
        number("memcg_eviction_run_aging_count_min", 3, "Agings before an eviction.", high=U64, done=True),
        flag("compact_disable", "Do not compact memory.", done=True),
        number("compact_period_secs", 600, "Seconds between two rounds.", high=U64, done=True),
        number("compact_period_psi_percent_limit", 1, "Skip a round above this pressure, percent.",
               high=100, done=True),
        number("compact_psi_percent_limit", 5, "Stop compacting above this pressure, percent.", high=100,
               done=True),
        number("compact_sec_max", 180, "Longest round in seconds.", high=U64, done=True),
        number("compact_order", 9, "Page order to compact for.", high=10, done=True),
        number("compact_threshold", 1024, "Pages of change that start a round.", high=U64, done=True),
        number("compact_force_times", U64, "Rounds after which one is forced.", high=U64, done=True),
    ],
})
