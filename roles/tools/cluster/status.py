"""`cluster status`: the one-page verdict (operator-tools.md 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click
import trio

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.host.clocks import Reading
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.cluster.verdict import Evidence, clock_offset_s, judge
from roles.durations import format_duration
from roles.survey.document import verdict_json
from roles.survey.evidence import gather
from roles.survey.overview import clock_of
from roles.survey.shown import agent_pace, clock, led_by, pace, short, tolerance
from roles.tools.cluster.show import with_session
from roles.tools.output import print_json, show_text
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


def lines_of(evidence: Evidence) -> Iterator[str]:
    """Return a line for each group, agent, manager and balancer: enough to see what is where and how it fares."""
    view = evidence.view
    for realm in view.realms:
        yield f"realm {realm.hex()}"
        for group in sorted(view.groups_of(realm), key=lambda one: (one.owned_range is None, one.id)):
            owned = "owns nothing" if group.owned_range is None else show_range(group.owned_range)
            rate = "" if group.owned_range is None else f", {group.requests_per_s:,.1f} requests/s"
            yield f"  group {short(group.id)}  {owned}, {led_by(group)}, {tolerance(group)}{rate}"
    for agent in view.agents:
        told = agent.status
        if told is None:
            yield f"agent    {agent.url}  does not answer"
            continue
        fares = [f"up {format_duration(told.uptime_s)}", pace(*agent_pace(told))]
        yield _service("agent", told.name, agent.url, [*fares, _clock(evidence, agent.clock)])
    for manager in evidence.managers:
        up = "" if manager.uptime_s is None else f"up {format_duration(manager.uptime_s)}"
        state = "does not answer" if manager.error else ""
        yield _service("manager", manager.name, manager.url, [state, up, _clock(evidence, manager.clock)])
    for balancer in evidence.balancers:
        state = "does not answer" if balancer.error else "not ready" if balancer.reasons else "ready"
        yield _service("balancer", balancer.name, balancer.url, [state])


def _clock(evidence: Evidence, reading: Reading | None) -> str:
    told = clock(clock_offset_s(evidence, reading))
    return told and f"clock {told}"


def _service(kind: str, name: str, url: str, told: Sequence[str]) -> str:
    named = f"{name} at {url}" if name else url
    return f"{kind:<8} {named}: {', '.join(part for part in told if part)}"


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
        for line in lines_of(evidence):
            click.echo(show_text(line))
        for problem in verdict.problems:
            click.echo(f"PROBLEM: {sentence(problem)}")
        for advice in verdict.advice:
            click.echo(f"advice: {sentence(advice)}")
        click.echo("healthy" if verdict.is_healthy else "trouble")
    if not verdict.is_healthy:
        end(ExitCode.FINDINGS)
