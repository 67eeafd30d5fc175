"""Short lists of function words, written for puna: articles, pronouns, prepositions, auxiliaries.

They are not the lists of any paper: shares counted with them are lower than with longer lists.
"""

from __future__ import annotations

STOP_WORDS: dict[str, tuple[str, ...]] = {
    language: tuple(words.split())
    for language, words in {
        "en": "a an the this that these those i me my you your he him his she her it its we us our they them "
        "their who whom whose which what and or but nor if then than because while as of at by for with "
        "about into through during before after above below to from up down in out on off over under not "
        "no am is are was were be been being have has had having do does did will would shall should can "
        "could may might must there here when where why how all any both each few more most other some such "
        "only own same so too very",
        "de": "der die das den dem des ein eine einen einem einer eines ich mich mir du dich dir er ihn ihm "
        "sie ihr es wir uns euch und oder aber denn wenn weil dass als wie von zu zum zur mit nach bei aus "
        "auf an am in im für über unter vor durch um ohne gegen nicht kein keine ist sind war waren bin bist "
        "sein hat haben hatte hatten wird werden wurde wurden kann können soll sollen muss müssen auch nur "
        "noch schon so sehr hier da dort wo was wer welche welcher dieser diese dieses man sich",
        "es": "el la los las un una unos unas yo me mi tú te tu él ella se su lo le nosotros nos ellos ellas "
        "y e o u pero ni si porque como de del a al en con por para sin sobre entre hasta desde no es son "
        "era eran fue fueron ser estar está están ha han había que qué quien cual cuando donde este esta "
        "estos estas ese esa eso muy más también ya todo todos",
        "fr": "le la les l un une des du de d je me moi tu te toi il elle on nous vous ils elles se lui leur "
        "leurs mon ma mes ton ta tes son sa ses et ou mais ni si car que qui quoi dont où à au aux en dans "
        "par pour avec sans sur sous entre ne pas est sont était étaient être a ont avait avoir ce cet cette "
        "ces très plus aussi tout tous comme quand",
        "it": "il lo la i gli le l un uno una io mi me tu ti te lui lei si noi ci voi vi loro e ed o ma né "
        "se perché come di del dello della dei degli delle a al allo alla ai agli alle da dal dalla in nel "
        "nella con su sul sulla per tra fra non è sono era erano essere ha hanno aveva avere che chi cui "
        "quale quando dove questo questa questi queste quello quella molto più anche già tutto tutti",
    }.items()
}
"""By language code."""
