from __future__ import annotations

from halfmoon.protocol.v1 import control_pb2
from halfmoon.proxy.members.absences import MAX_ABSENCES, Absences


def info(number: int) -> control_pb2.MemberInfo:
    return control_pb2.MemberInfo(id=f"decode-{number}", pid=number)


def told(absences: Absences) -> list[tuple[str, str]]:
    return [(one.info.id, one.why) for one in absences.to_proto()]


def test_the_last_reason_counts_and_a_member_that_is_back_is_forgotten() -> None:
    absences = Absences()
    absences.note(info(0), "silent")
    absences.note(info(1), "broke")
    absences.note(info(0), "refused")
    assert told(absences) == [("decode-1", "broke"), ("decode-0", "refused")]
    absences.joined("decode-1")
    absences.joined("nobody")
    assert told(absences) == [("decode-0", "refused")]


def test_only_so_many_are_remembered_and_the_oldest_go_first() -> None:
    absences = Absences()
    for number in range(MAX_ABSENCES + 3):
        absences.note(info(number), "")
    assert len(told(absences)) == MAX_ABSENCES and told(absences)[0][0] == "decode-3"
