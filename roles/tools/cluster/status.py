"""`cluster status`: the one-page verdict (operator-tools.md 2)."""

from __future__ import annotations

import click
import trio

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.host.cluster.verdict import Evidence, judge
from roles.survey.document import verdict_json
from roles.survey.evidence import gather
from roles.survey.overview import clock_of
from roles.tools.cluster.show import with_session
from roles.tools.output import print_json
from roles.tools.session import Connection, Session, end, with_connection
from roles.words import counted, sentence


def summary(evidence: Evidence) -> str:
    """Return how many of everything there are, in one line."""
    view = evidence.view
    counts = (
        (len(view.realms), "realm"),
        (len(view.groups), "group"),
        (len(view.hsms), "HSM"),
        (len(view.agents), "agent"),
        (len(evidence.managers), "manager"),
        (len(evidence.balancers), "load balancer"),
    )
    return ", ".join(counted(count, name) for count, name in counts)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_connection
def status(connection: Connection, *, as_json: bool) -> None:
    """Judge the cluster's health: one line for each problem and each advice; exit 5 when there is a problem.

    Problems: agents, HSMs, managers or balancers that do not answer; fewer than two managers; members down; groups
    without a leader; groups of one member or an even number that serve, where the realm has three HSMs or more; ranges
    nobody serves; transfers pending for more than a minute; balancers that are not ready (stale secrets or routes);
    certificates that end within 20 days; clocks that are off; different versions; a growing outbox.
    """

    async def body(session: Session) -> Evidence:
        now_ms = session.now_ms()
        return await gather(
            session.store,
            session.rpc,
            now_ms,
            own_certificate_end_ms=to_unix_ms(session.certificate_end),
            own_clock=clock_of(now_ms, trio.current_time()),
        )

    evidence = with_session(connection, body)
    verdict = judge(evidence)
    if as_json:
        print_json(verdict_json(evidence, verdict))
    else:
        click.echo(summary(evidence))
        for problem in verdict.problems:
            click.echo(f"PROBLEM: {sentence(problem)}")
        for advice in verdict.advice:
            click.echo(f"advice: {sentence(advice)}")
        click.echo("healthy" if verdict.is_healthy else "trouble")
    if not verdict.is_healthy:
        end(ExitCode.FINDINGS)
