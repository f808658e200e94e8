"""Where each command of the one executable lives: the services and the tools, by name (operator-tools.md 12).

The table is addresses, not imports: whoever asks for a command loads its module then. It is also how a tool may look
at the flags of a service, which `config` does, without knowing how the service is built.
"""

from __future__ import annotations

from typing import Final

from roles.lazy import LazyCommand

ROLES: Final = {
    "agent": LazyCommand("roles.agent.main", "The process in front of one HSM."),
    "lb": LazyCommand("roles.lb.main", "The HTTPS edge that authenticates clients."),
    "manager": LazyCommand("roles.manager.main", "Appoints leaders, spreads them and moves key ranges."),
}

TENANT_LOG: Final = LazyCommand("roles.tenant_log.main", "Run the HTTP service for tenants' auditors.")

TOOLS: Final = {
    "bench": LazyCommand("roles.tools.bench.command", "Measure: client, hsm, tree, store, rpc; compare."),
    "chaos": LazyCommand(
        "roles.tools.chaos.command", "Break a real realm under load and check that each guess counted once."
    ),
    "check": LazyCommand(
        "roles.tools.check.command", "Register, recover and delete against a realm, once or for ever."
    ),
    "cluster": LazyCommand(
        "roles.tools.cluster.command", "See and change a cluster: realms, groups, leaders, certificates."
    ),
    "config": LazyCommand("roles.tools.config.command", "Check and show the configuration of a role."),
    "demo": LazyCommand(
        "roles.tools.demo.command", "Run a real realm here and register and recover a secret against it."
    ),
    "hsm": LazyCommand("roles.tools.hsm.command", "Prepare an HSM: realm keys and state directory."),
    "secrets": LazyCommand("roles.tools.secrets.command", "Write and check the secrets file: record id key, tenants."),
    "simulate": LazyCommand(
        "roles.tools.simulate.command", "Play whole realms in one thread, each from one seed, and judge them."
    ),
    "store": LazyCommand("roles.tools.store.command", "Make, check, tidy, back up and restore the store."),
    "tenant-log": LazyCommand(
        "roles.tools.tenant_log.command", "Serve and read tenants' events: every guess, for auditors."
    ),
    "tokens": LazyCommand("roles.tools.tokens.command", "Create, validate and draw keys for auth tokens."),
    # names that scripts of existing realms use
    "cluster-bench": LazyCommand("roles.tools.bench.client", "", hidden=True),
    "cluster-cli": LazyCommand("roles.tools.cluster.command", "", hidden=True),
    "service-checker": LazyCommand("roles.tools.check.command", "", hidden=True),
}
