"""Plots at home: things lost and broken, fears, small lies. Markup as in grammar.py."""

PLOTS = r"""
== the lost treasure: child paw folk
thing & last & found = red ball & I kicked it down the hill & in the long grass at the bottom of the hill. A frog sat
    on top of it like a king / silver bell & I rang it for the ducks & beside the duck pond. A baby duck was pushing
    it with its beak to make it ring / wooden boat & I let it float in the stream & where the stream bends. It was
    stuck between two stones, and a frog was sitting in it like a captain / green blanket & I made a tent with it
    behind the shed & behind the shed. A gray cat was fast asleep on it / woolly hat & I put it down to pick some
    flowers & in the middle of the flowers. A snail was asleep inside it
wrong = an old sock / a broken cup / half a sandwich / one rusty spoon
from = {his} grandma / {his} uncle / {his} best friend / {his} big sister

[{opening} {He} had a {thing}[ from {from}|]. {He} [took it everywhere|loved it more than anything|even slept with it
at night]. One [morning|day], {h} [reached for|looked for] it, and it was gone.|{opening} <{He} was not very tidy.>
[One morning|One day|One rainy day], {he} could not find {his} [favorite thing|best thing], a {thing}[ from
{from}|].|"Where is my {thing}?" cried {h}. It was {his} favorite thing in the whole [world|{home}], and {he} could
not find it anywhere.]

{He} looked [under the bed|behind the door|in every corner|in the big pot]. [Nothing was there but dust.|It was not
there.|{He} only found {wrong}.] {He} looked [under the rug|on the top shelf|behind the clock|in {his} boots]. It was
not there either. <[{H} even looked in the soup.|{H} even looked inside the teapot, just in case.] "{mom}, have you
eaten my {thing}?" {he} asked. "Not today," said {mom}.> <{sad}.>

<[{His} friend {f.full} came to help. "I found something!" {f.he} called[ from outside|]. But it was only [a leaf|a
pine cone|an old shoe]. "[Thank you|It is very nice], but that is not my {thing}," {h} said[ in a small voice|].|{His}
friend {f.full} came by to play. When {f.he} heard the sad news, {f.he} began to look too. They looked high and low[,
but they did not find it|].]> <The day went by, and still there was no {thing}.>

"[Do not run around|Stop and think]," said {mom}. "[When did you have it last?|Where did you play with it last?]" {h}
closed {his} eyes and [thought hard|thought and thought]. <[{He} saw yesterday in {his} head, like pictures in a
book.|Slowly, yesterday came back to {him}.]> "[I know!|Oh!|Wait!] {last}!" {He} ran [as fast as {he} could|all the
way there|out of the door]. And there it was, {found}!

[{h} laughed so hard that {he} fell over.|{joy}.] <"[There you are|I missed you]!" {he} said[ to the {thing}|].> [That
night, {h} put the {thing} next to {his} pillow.|From then on, the {thing} had its own place by the door, and {h} put
it there every night.|After that day, when {h} lost something, {he} did not cry. {He} closed {his} eyes and
thought.|{h} held the {thing} [close|tightly] all the way home.] <[It smelled a little of mud, but {he} did not
mind.|It was wet and a bit dirty, but to {h} it was perfect.]>

== the noise in the night: child paw folk
noise & cause & fix = Tap, tap, tap & a thin branch that the wind pushed against the window & {mom} tied the branch
    back with a piece of string / Drip, drop, drip & rain that fell through a hole in the roof into a pot & {mom} put
    a soft cloth in the pot, and the drops made no sound / Scratch, scratch & a tiny mouse who was pulling a big crust
    of bread across the floor & {h} gave the mouse a crumb of cheese, and it bowed and ran away / Whoo, whoo & the
    wind singing in an empty jar & {mom} put a flower in the jar, and the song stopped / Bump, bump, bump & a lost
    puppy who was wagging its tail against the door & they let the puppy in and gave it a warm place by the fire
monster = a dragon with wet feet / a bear in big boots / a hungry ghost / a monster with three heads

[{opening} {He} was brave [all day long|when the sun was up], but at night it was not so easy. One night, {he} heard
something.|It was [very late|a dark night|a night without a moon]. {h.full} lay in bed and could not sleep. Then {he}
heard it.|The moon was up, and the whole {home} was asleep. Only {h.full} was awake. {He} had heard something.]
{noise}! {He} [pulled the blanket up to {his} nose|sat up in bed|held {his} breath].

"What [is|was] that?" {he} [whispered|thought]. <{noise}! There it was again.> [{h} was sure that it was
{monster}.|"It must be {monster}," {h} thought, and {his} heart beat fast.] <{He} hid under the bed, but it was dark
and full of dust there, and {he} sneezed. Now the monster knew where {he} was!> <{He} put the pillow over {his} ears.
It did not help.>

{h} [crept|ran on {his} toes] to {mom}. "[Wake up|Please wake up]! There is {monster} [in|outside] our {home}," {he}
said. <{mom} [yawned|opened one eye|lit a little lamp].> "[That would be something new|Then it must be cold and
tired]," said {mom}. "[Shall we go and look?|Let us go and say hello.]" {H} [did not want to|was not so sure], but
{he} took {mom} by the {hand}. <The floor was cold under their feet.> [Step by step|Slowly and quietly], they went
[toward|closer to] the noise. <{noise}!>

<[{h} held up the lamp with a shaking {hand}.|{h} counted to three and looked.|"Hello?" asked {h} in a very small
voice.]> [It was not {monster} at all.|There was no monster.] It was [only|just] {cause}! {h} [began to laugh|laughed
and laughed]. <"What a silly monster," {he} said.> <[Then {fix}.|So {fix}.]>

<["Things look bigger in the dark," said {mom}. "It is good to go and look."|"You were afraid, and you still went to
look," said {mom}. "That is what brave means."|{mom} made two cups of warm milk, and they drank it together in the
moonlight.]> <{h} went back to bed[ and pulled up the blanket|].> <{He} listened. Now the {home} was [still|quiet].>
[This time, {he} fell asleep at once.|Soon {he} was asleep, and {he} dreamed of {monster} who was {his} friend.|The
next night, {he} heard a new noise. {He} only smiled and said, "Good night, noise."]

== the broken gift: child folk
thing & how & glue = blue cup & it fell from the table & tiny flowers / clay bird & its wing fell off & gold stars /
    music box & the little door came off & red hearts / wooden horse & one leg broke & green leaves / glass ball & it
    rolled off the shelf & white snow
hidden = under the bed / in a drawer / behind the curtain / in an old boot

[{opening} {His} best friend was {f.full}. {F.he} had a {thing}, the [prettiest|most beautiful] thing {h} had ever
seen.|{h} loved to visit {f.full}, because {f.he} had a beautiful {thing}. <It stood [on a shelf|by the window] and
[shone in the sun|was older than both of them].>|{day}, {h} went to play with {his} friend {f.full}. On the table
stood a {thing}. "Please do not touch it," said {f}. "It was a gift from my [grandma|aunt]."]

[After a while, {f} went out to [get some juice|feed the cat|pick a flower], and {h} was alone with it.|When {f} left
the room, {h} looked at the {thing}.] <[{He} only wanted to hold it for a second.|"Just one little touch," {he}
thought.]> {He} picked it up, and [then {he} sneezed|a door banged]. <[Crash!|Oh no!|Crack!]> The {thing} slipped from
{his} {hands}, and {how}. <{h} [felt cold all over|did not dare to breathe|could hear {his} own heart].> Quickly {he}
hid it {hidden}.

"Where is my {thing}?" asked {f}[ a little later|]. "[I do not know|I did not see it]," said {h}. <[The words felt
like stones in {his} mouth.|{His} ears turned red.]> <{F} looked and looked.> <[{F.he} even looked in the garden|Then
{f.he} began to cry].> <"Maybe a thief took it," {f.he} said.> {h} [could not eat {his} dinner|tried to play, but
nothing was fun]. <[That night, {he} could not sleep.|There was a knot in {his} tummy, and it grew and grew.]> <"It
was only a small lie," {he} told {himself}. But it did not feel small.>

[In the morning|The next day|At last], {h} [ran back to {f}|could not stand it any more]. "[It was me|I did it]," {he}
said. "I broke your {thing}, and I hid it {hidden}.< [I was afraid you would not like me any more.|I am so sorry.]>"
<{f} was quiet for a [long time|moment].> "[I am sad about it|I am a little angry]," said {f}, "but I am glad you told
me. [A friend is worth more than a {thing}.|I would rather have a broken {thing} than a friend who lies.]"

[Together they got the glue|{h} went to get glue and paint], and they worked [all afternoon|until lunch]. You could
still see [the crack|where it broke], so {h} painted {glue} over it. <"[I like it even better now|Now it is the only
one like it]," said {f}.> [{h} felt light again, like a feather.|The knot in {his} tummy was gone.] <And this time,
{h} looked at the {thing} with {his} {hands} behind {his} back.> <[It still stands there today.|They put it back in
its place, and then they went out to play.|And {h} learned that the truth can be hard to say, but a lie is harder to
carry.]>

== the lie that grew: child paw
cake & who & why = plum cake & the cat & it jumped on the table / apple pie & a crow & it flew in through the window /
    honey cake & the wind & it blew the cake away / birthday cake & a big dog & it ran in and ate it all
sign = a crumb on your nose / cream on your chin / sugar on your ear / sticky spots on your {hands}

[{opening} {He} loved all sweet things.|{opening} {day}, the whole {home} smelled of sugar.|Mmm! What was that sweet
smell? {h} followed {his} nose into the kitchen.] {mom} had made a {cake} for [the fair|the party|the neighbors]. <[It
was still warm.|It stood on the table, round and golden.]> "[Do not touch it|It is not for now]," said {mom}[, and
went out to the garden|].

{h} [took one small bite|only wanted a taste]. <[It was so good!|It was soft and sweet.]> {He} took one more[ bite|],
and one more. Soon [half the {cake} was gone|there was a big hole in the {cake}|only a few crumbs were left]. Then
{mom} came back. "[Who ate the {cake}?|What happened to my {cake}?]" [asked {mom}|{mom} cried]. {h} looked at {his}
feet. "It was {who}," {he} said. "[I saw it.|It was terrible.] {Why}."

"[Is that so?|Really?]" asked {mom}. "[Which way did it go?|What did it look like?|Was it big?]" <[{h} had to think
fast.|That was a hard question.]> "Oh, it was [as big as a house|very, very big]," {he} said. "<It [had long
teeth|wore a red hat|made a terrible noise]. >Then it went [up the hill|over the wall|into the woods]." <[One lie
needed another lie, and that one needed two more.|With every word the lie got bigger.]> <{His} friend {f.full} heard
it and was so scared that {f.he} hid under the table. "I will never go outside again!" {f.he} cried.> <Soon all the
[neighbors|friends] were running around to look for it.>

{h} [did not feel good|felt awful]. <[The lie was now so big that it filled the whole room.|{His} tummy hurt, and not
only from the {cake}.]> "[Stop!|Wait!]" {he} [cried|said] at last. "It was not {who}. <I made it all up.> I ate it[,
and I am sorry|. I am sorry]." <[It was very quiet.|Nobody said a word.]> Then {mom} [smiled a little|laughed]. "I
know," said {mom}. "You have {sign}."

[Together they baked a new {cake}, and {h} did not lick the spoon even once.|"Come," said {mom}. "You can help me make
a new one." {h} stirred until {his} arms were tired.|{h} washed all the plates, and then they made a new {cake}
together.] [This time, {h} got the first piece, because {he} had told the truth.|When it was done, {h} gave away {his}
own piece.|That evening, {h} went to bed with no cake and no lies, and {he} slept well.] <The truth is small, but it
tastes sweet.>

== the seed that slept: child paw folk
flower & first = sunflower & a green dot, no bigger than a pin / pumpkin & a pair of small round leaves / rose & one
    thin green leaf / bean & a little green hook / apple tree & one tiny twig with a leaf
pot = a red pot / an old boot / a cracked cup / the garden

[{opening} {day}, {g.a} gave {him} a seed[ as small as a crumb|]. "[This is a {flower}|One day this will be a
{flower}]," said {g}.|{h} held out {his} {hand}, and {g.a} put a seed in it. "{g.hm}," said {g}. "There is a {flower}
asleep in there."|{opening} More than anything, {he} wanted to grow a {flower}[ taller than {himself}|]. So {he} got a
seed from {g.a}.] {h} put the seed in {pot}, gave it some water, and sat down to wait.

<[{He} waited until lunch.|{He} waited for a whole hour.]> [Nothing happened.|The earth stayed as it was.] <"[Maybe it
is thirsty|Drink, little seed]," {h} said, and {he} gave it more water.> <[The next day|In the morning], there was
[still nothing|only wet, brown earth]. "Maybe it is cold," {he} said, and {he} put [a sock|a scarf|a blanket] on it.
[Still nothing!|That did not help.]> <{H} sang to it. {He} told it a joke. The seed did not laugh.> {He} dug it up to
look at it. <[It was just a seed.|It looked the same as before.]> "My seed is [broken|lazy]!" {he} told {his} friend
{f.full}.

<{f} [put {f.his} ear to the ground|looked at the mud].> "<[Maybe it is only sleeping.|I cannot hear it snore.] >[We
should|Let us] ask {g}," {f.he} said. So they did. "{g.hm}," said {g}. "[How would you like it if somebody woke you up
every hour?|You cannot pull a flower out of the ground. It has to come when it wants to.]< [A little water, a little
sun, and a lot of time. That is all.|Give it sun, give it water, and then give it time.]>" <[Waiting was the hardest
thing {h} had ever done.|"Time is the hardest part," said {h}.]>

[One day went by, then two, then three.|The days went by.] <{h} [gave it a small drink each morning and did not
dig|counted the days on the wall].> <It rained. The sun came out. A worm came to visit and left again.> [Then, one
morning|On the tenth day], there was {first}! "[It woke up|Look]!" {h} [whispered|shouted]. <[{He} did not touch it.
{He} only looked.|{joy}.]>

[All summer, it grew and grew.|Week after week, it grew.] <[In the end it was taller than {h}.|Soon it was the finest
{flower} for miles around.]> And when it was [done|old], it gave {h} [ten|a whole handful of] new seeds. {h} gave one
to {f}. "[Now you must wait|Do not dig it up]," {he} said[ with a smile|]. "[It is only sleeping.|Good things take
time.]"

== afraid of the water: child paw folk
place & thing = lake & smooth white stone / sea & pink shell / river & shiny blue stone / pond & green glass ball
fear = it was cold and deep / something might bite {his} toes / the water might pull {him} down / a wave might carry
    {him} away

[{opening} {He} was not afraid of [spiders|thunder] or of the dark. But {he} was afraid of the {place}. {He} thought
that {fear}.|All {his} friends loved to swim in the {place}, but {h} [stayed on the grass|sat under a tree and
watched]. {He} was afraid that {fear}.|{day}, {h} stood by the {place} and did not move. "I cannot go in," {he} said.
{He} was sure that {fear}.] "[Come in, {h}!|The water is warm!]" called {his} friend {f.full}. "[No, thank you|I have
a cold]," said {h}. <"[I like it here.|Somebody must look after the towels.]">

<[The others laughed and splashed.|It was hot, and {h} felt sweat run down {his} nose.] {He} wanted to join in so much
that it hurt.> {f} came and sat down next to {him}. "[Are you afraid?|Tell me the truth. Is it the water?]" {f.he}
asked[ softly|]. {h} nodded. <[{He} thought {f} would laugh. But {f} did not.|"Please do not tell the others," {he}
said.]> "I was afraid too, last year," said {f}. "[Do you know what I did? One toe a day.|I began with one toe.]"

<["Only one toe?" asked {h}.|One toe did not sound so bad.]> So {h} put one toe in the water, and [took it out fast.
It was cold!|nothing bit it.] The next day, {he} put in both feet. <[A little fish tickled {him}, and {he}
laughed.|The mud felt soft and funny.]> <On the third day, {he} [went in up to {his} knees|stood in the water and
counted to ten].> <Then a big wave came, and {h} fell down with a splash! {He} got water in {his} nose and ran out. "I
am never going back," {he} said. But in the morning, {he} was there again.> <Each day, {f} [held {his} {hand}|stayed
close by].>

[Then, one day|At the end of the week], {h} saw [something shine|something] under the water. It was a {thing}! {He}
wanted it so much that {he} forgot to be afraid. [{He} took a deep breath|"One, two, three," {he} said], and put {his}
whole head under. <[It was quiet and green down there, like another world.|Under the water, everything was blue and
still.]> When {he} came up, {he} had the {thing} in {his} {hand}. <"[You did it!|You were under the water!]" {f}
shouted. "[Did I|Really]?" asked {h}.> <[{joy}.|{He} laughed until {he} coughed.]>

<[{h} gave the {thing} to {f}. "This is for the first toe," {he} said.|{h} put the {thing} by {his} bed. "It will help
me to remember," {he} said.]> [After that, they had to call {h} three times to get {him} out of the {place}.|The next
day, {h} was the first one in.|And when a small [boy|rabbit|mouse] stood by the {place} and did not dare to go in, {h}
sat down beside him and said, "Do you know what I did? One toe a day."]

== the forgotten birthday: child paw folk
excuse & real = I have to wash my socks & there was a big sign made of socks. Each sock had a letter on it / I have to
    count my [buttons|stones] & there was a path of colored stones, and it led to a long table / I have to help {mom}
    in the kitchen & there was a cake as high as a chair / I have to find a long ladder & there were lamps in all the
    trees, like little moons
gift = a red kite / a drum / a warm scarf / a tiny boat / a book full of pictures

[{opening} [Today was {his} birthday|It was the morning of {his} birthday], and {he} was up before the sun.|"Today is
my birthday!" said {h}, and jumped out of bed.|{h} woke up and smiled. {He} had waited for this day [all year|for a
hundred days]. It was {his} birthday!] <{He} [washed {his} face twice|combed {his} hair] and ran to the kitchen.>
"Good morning," said {mom}. "[Please take out the trash.|Eat your breakfast.]" {h} waited, but {mom} said nothing
more. <[There was no cake on the table. There was only soup.|There was no gift by {his} cup.]>

[Maybe {his} friend {f} would remember.|{h} went to see {his} friend {f.full}.] "Hello, {f}!" said {h}. "[Do you know
what day it is?|Is today not a special day?]" "[It is Monday|It is bath day]," {f.he} said. "[I have no time|I am in a
hurry]. {Excuse}." And {f.he} [ran off|closed the door]. <{h} went to {g.a}. "{g.hm}, I am so busy," said {g}.>
<[Nobody had time.|Everybody had something to do.]> <Even the [birds|bees] flew past without a word.>

[{h} walked and walked|{h} went down to the stream and sat on a stone]. "[Happy birthday to me|They all forgot]," {he}
said to [a snail|a small snail]. {sad}. <[A tear fell into the water. Plop.|{He} kicked a stone. The stone hurt {his}
toe.]> [When the sun began to go down, {he} went home.|It got cold, and so {he} went home.] <"Maybe I am too old for
birthdays," {he} thought.> [The windows were dark.|There was no light in the {home}.] {He} opened the door.

"[Surprise|Happy birthday]!" <[Lights went on everywhere.|They all jumped out at once.]> {f} was there, and {mom}, and
all {his} other friends. And {real}! "[But I thought you forgot|But I thought that nobody knew]," said {h}. "[Of
course we knew|How could we forget]!" said {f}. "[We worked on this for a week!|I almost told you three times!]< It
was so hard to keep it a secret.>" {F.he} gave {him} {gift}.

<[{h} laughed and cried at the same time.|{joy}.]> They [ate and danced|sang and played games] until the [moon|stars]
came out. <[When it was time to blow out the candles, {h} did not know what to wish for. {He} had everything.|Before
{he} went to bed, {h} went out to the snail. "They did not forget," {he} told it. The snail already knew.|"Best
birthday ever," {h} said with a yawn. "But next year, please forget it a little less."]>
"""
