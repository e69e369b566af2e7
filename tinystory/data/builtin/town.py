"""Plots about friends, games and work. Markup as in grammar.py."""

PLOTS = r"""
== the sandcastle quarrel: child paw folk
thing & mine & yours & both = sandcastle & tall, with a tower & wide, with a wall & a tall tower, and around it a wide
    wall / snow house & round, like an egg & long, like a train & a round room and a long hall / tree house & high, to
    see the stars & low, to hear the frogs & a high room, a low room, and a ladder between them / raft & fast, with a
    big sail & safe, with a strong rail & a big sail and a strong rail

[{opening} {day}, {he} and {his} friend {f.full} wanted to build a {thing}.|{day}, {h.full} and {his} friend {f.full}
began to build a {thing}.|"Let us build a {thing}!" said {h.full} to {his} friend {f.full}.] "[It must be|I want it]
{mine}," said {h}. "[No|Oh no], {yours}," said {f}. <[They both got loud.|"{Mine}!" "{Yours}!"]> <"You never listen,"
said {h}. "You never ask," said {f}.> [They drew a line down the middle.|So {f} went to one side, and {h} went to the
other.]

{h} built alone. But [nobody held the other end|it fell down, and then it fell down again]. {f} built alone, too<, and
{f.his} side leaned like a sleepy cow>. <{h} found a funny stone and turned to show it to {f}. Then {he} remembered
that they were not talking.> It was [very quiet|no fun at all].

"[Your side is not so bad|I like your corner]," said {h} at last[, and {he} looked at {his} feet|]. "[I need somebody
to hold this|Mine fell on my head]," said {f}. They [both began to laugh|had to laugh]. <"I am sorry I was loud." "I
was louder."> So they [wiped away the line|began again], and this time, the {thing} had {both}. [It was the best
{thing} anybody had ever seen.|When it was done, they sat beside it and ate {food}.|They gave it both their names.]
<And when they could not agree on a flag, they made two.>

== learning to ride: child
thing & fail = bike & rode into a bush / sled & slid down backward / scooter & ran into the trash can

[{opening} For {his} birthday, {he} got a {thing}, [red|blue|green] and shiny.|{h.full} had a new {thing}, but {he}
did not know how to use it.] "Do not let go!" {he} told {mom}. "I will not," said {mom}. {He} [got on|held on tight],
and at once {he} {fail}. <[Bump!|Ouch!]> <"That was very good falling," said {mom}.>

The next day, {h} tried again, and {he} {fail}, again. {His} friend {f} [never fell|went by without looking down
once]. "[I will never learn it|I hate this {thing}]," said {h}<, and {he} threw it in the grass>. "How many times did
you fall?" asked {f}. "Ten," said {h}. "[I fell fifty times|Only ten? I fell twice as much]," said {f}. "[Look, I
still have a mark on my knee|You can ask my knees|And I cried every time]."

[{h} counted after that.|So {h} tried again.] [Eleven, twelve, thirteen.|Eleven hurt. Twelve hurt less.] <Each time,
it was a little better. Fourteen was almost good.> And then the trees flew by, and the wind was in {his} hair. <"Am I
doing well?" {he} called back.> {mom} was far behind, [waving|a small dot at the end of the street]. Nobody was
holding {him}! {He} was so surprised that {he} fell down. "[Fifteen|That was the last one]!" {h} shouted, and {he}
[laughed|jumped up].

== the new one: child
hobby & show = liked to draw horses & drew a horse with wings / could whistle & whistled so well that a bird answered
    / knew all about bugs & put a shiny green beetle on {his} desk / folded paper into boats & folded a paper boat

[{opening} It was {his} first day at a new school.|It was the first day of school, and {h.full} did not know
anybody.|{mom} held {h} by the hand until they came to the door of the new school.] <[The room was full of loud
children.|Everybody already had a friend.]> {h} sat in the last row and [did not say a word|looked at {his} shoes].
"[What if nobody likes me|What if I sit alone all year]?" {he} thought. <The clock went tick, tock, very slowly.>

At lunch, {he} sat under a tree. Another child sat there, too, [behind a book|all alone]. It was {f.a}. They both
looked at [the same ant|an ant]<, which was [carrying a crumb|pulling a leaf]>. "Where is it going?" asked {h}. <It
was not much, but it was a start.> "[Home|To a party|To school], I think," said {f}, and {f.he} smiled. <They gave the
ant a bit of bread, so that it had something to bring.>

{h} {hobby}. "Show me," said {f}. So {he} {show}. <"Can you teach me?" asked {f}. Soon [three|four] others came to
look.> [When the bell rang, {h} was sorry.|By the end of lunch, {h} knew nine names.] "How was it?" asked {mom}. "[I
met an ant|We talked about an ant]," said {h}. <[The next week, another new child came. {h} knew just what to do.|And
the next morning, {he} ran to school so fast that {he} forgot {his} bag.]>

== soup for a friend: child paw folk
need & from = a potato & from the goat / an onion & from the old hen / a carrot & from the donkey / a bit of salt &
    from the baker
price = a song / a button / a good joke / an hour of work

[{opening} {day}, {his} friend {f.full} did not come out to play.|"Achoo!" The sound came from the house of {f.full},
and {h.full} looked in.] {F} was in bed with a red nose. <"[I am sick|Do not come close]," {f.he} said. "[I cannot
taste anything|Everything hurts, even my hair]."> "You need soup," said {h}, "[and I will make it|and right now]."

But there was no food in {his} kitchen, only a pot[ and a spoon|]. So {he} went to get {need} {from}. <"[What will you
give me for it|What do I get]?" {h} was asked.> {He} had no money, so {he} paid with {price}. <Then {he} needed a
second thing, and a third. {He} sang, and swept, and fed the pigs, until the basket was full.>

[Bubble, bubble, went the pot.|Soon the pot was singing.|{He} cooked and stirred until the windows were wet.] <[It
smelled so good that the cat came in.|{h} burned {his} tongue, but only a little.]> {He} carried the soup up the
hill[, step by step|]. And then {he} fell! [Half the soup was gone.|Most of it ran down the hill.] {h} stood at the
door with wet feet. "[There is only a little left|I spilled it]," {he} said. {F} drank the rest slowly. "[It is just
enough|It is the best soup of all]," {f.he} said. <"I can taste it!"> [The next day, {f} was well again, and {h} had a
red nose. "My turn," said {f}, and {f.he} went to find a pot.|They sat together, and {h} told {f.him} how the hill had
eaten the rest.]

== the spilled paint: child
spot & art = blue & a whale / green & a dragon / red & a fire truck / yellow & a lion

[{opening} {He} liked to paint.|{h.full} wanted to paint the most beautiful picture in the school.] {He} painted a
white house with [roses|a tree] and a cat, and {he} worked on it all week. <Every brick was in the right place.> Then
{his} friend {f} [ran past|came to look] and hit the jar. Splash! {Spot} paint ran over the house.

"[You ruined it|My picture]!" cried {h}. <"[I did not mean to|I am sorry]," said {f}[, and {f.he} was close to
tears|].> {h} wanted to tear the picture up. <{He} walked to the window and back. {He} counted to ten, and then to ten
again.> Then {he} looked at the {spot} spot. {He} turned the paper around. "[Look|Wait]," {he} said. "[I see a tail|I
see an eye]."

{He} gave the spot eyes and a mouth. {F} painted teeth. [Now it was {art}, and it was about to eat the house.|It was
{art}, looking in at the window.] <The cat looked very surprised.> <They laughed so hard that they nearly spilled the
red.> <Everyone at school [wanted to see it|loved it].> "[How did you think of that?|Who had this idea?]" asked the
teacher. {h} and {f} looked at each other. "[The jar did it|It just came to us]," said {h}.

== too busy to play: child paw
job = washing the windows / digging in the garden / painting the fence / mending the roof
game = a pirate ship / a race / a hunt for lions / a song

[{opening} {day}, {he} wanted to play, but {mom} was {job}.|{mom} was {job}. "Play with me!" said {h.full}.]
"[Later|When I am done]," said {mom}. {h} waited. <{He} [counted {his} toes|looked at the clock] and waited some more.
"Are you done?" "Not yet."> <The sun went over the roof and started down the other side.>

{h} [kicked a stone|lay in the grass]. <"It will take all day," {he} said.> {He} thought for a while. "[How fast is it
with two|Is it faster if I help]?" {he} asked. "[Twice as fast|A lot faster]," said {mom}, and gave {him} [a wet
cloth|a small bucket]. It was [hard|not easy], and {his} arms got tired. <"You missed a spot," said {mom}. "You missed
two," said {h}.>

But then [{h} turned it into|they turned it into] {game}, and they [forgot that it was work|laughed all the way
through]. [And then it was done.|Before they knew it, it was done.] <"[Thank you|I could not have done it without
you]," said {mom}.> Then {mom} asked, "Now, what shall we play?" "[But we just played|That was the game]," said {h}.
<"[Is there more to do?|Let us do it again tomorrow.]"> Then they sat [on the step|in the shade] and had {food}, and
their {hands} were dirty in the same places.

== who ate the cookies: child paw folk
clue & who & why = a tiny wet footprint & a frog & The frog had hurt its leg and could not jump / a long gray hair &
    an old mouse & The mouse had nine hungry children / a small black feather & a young crow & The crow had lost its
    nest in the storm / one acorn & a squirrel & The squirrel could not find its own food under the snow

[{opening} Every night, somebody took one cookie from {his} kitchen.|"One, two, three," counted {h.full}. There had
been four cookies. Somebody had taken one!] "[Was it you|Did you do it]?" {he} asked {his} friend {f.full}. <"[I only
eat the ones with nuts|No, but I wish I had]," said {f}.> "Then [there is|we must catch] a thief," said {h}, and {he}
put on a big hat.

[They looked for clues.|{h} looked at the floor through a bottle.] By the window was {clue}. "Aha!" said {h}. That
night, they hid [under the table|behind the coats|in the closet] and waited. <[{F} fell asleep and snored.|{h}'s foot
went to sleep.]> <The clock struck ten. It struck eleven.> [Then they heard it.|Then there was a noise.|At last,
something moved.] [Tip, tap, tip.|Scratch, scratch.] [They jumped out.|{h} lit the lamp.] "[Stop|Got you]!"

It was {who}, shaking all over. <"[Please do not hurt me|I am sorry]," it said.> {Why}. <[{h} took off {his} big
hat.|{h} did not feel like shouting any more.]> "[You could have asked|You only had to ask]," said {h}. <"[I did not
know that|I was too shy]," it said.> {h} [filled a bag with cookies|opened the whole jar]. [Now there is always a
plate by the window. Nobody takes it. They are invited.|"The case is closed," said {f} with a full mouth.]

== the treasure map: child paw folk
one & two & where = walk ten steps from the door & turn left at the big rock & under the old apple tree / follow the
    stream & cross the bridge & behind the waterfall / go up the hill & look for three trees & under a hollow log
what & use = a cup, a bell, and an old hat & They put on the hat, rang the bell, and drank tea from the cup / a drum
    with a hole in it & They mended the drum and played until dark / a pile of old toys & They washed the toys, and
    every toy got a new name / a bag of seeds & They planted the seeds, and in spring there were flowers everywhere

[{opening} {day}, {he} found a map [in an old book|under the rug].|"Look!" said {h.full}. "A treasure map!"] {He} ran
to show it to {his} friend {f.full}. <"[It must be gold|We will be rich]!" said {f}.> The map said to {one} and then
to {two}. <They argued about which way was up.> They [went over|climbed over] stones and through [mud|thorns], and
[{h} lost a shoe|{f} got stuck in a hedge].

[They dug here. Nothing. They dug there. Only a worm.|First they went the wrong way and met an angry goose.] "[Let us
go home|I am tired]," said {f}. "[One more time|One more look]," said {h}. {He} turned the map over. On the back was
[a small red cross|one more line]. The treasure was {where}! They dug, and there was [a box|an iron box]. <{h}'s heart
beat fast.> They opened it, creak, and found {what}.

[It was not gold.|{f} looked for gold at the bottom, but there was none.] <On top lay a letter. "This was the best we
had when we were small," it said. "[Have fun with it.|Now it is yours.]"> {Use}. <[Before they went home|In the end],
they put {h}'s best [marble|button] in the box and [dug a new hole|wrote a new letter]. [Somebody would find it one
day.|Now they only had to draw a new map.]>

== the kite that failed: child paw
thing & fail1 & fail2 & works = kite & it was too heavy & its tail was too short & rose over the roofs / boat & it was
    too thin and fell over & it had a hole & sailed across the pond / bird house & the door was too small & the roof
    let in the rain & had birds in it before lunch / chair & it had one short leg & it had five legs & was so strong
    that {mom} could sit on it

[{opening} {He} wanted to make a {thing} all by {himself}.|"I will make a {thing}," said {h.full}, "and I do not need
any help."] {He} worked all morning, [with {his} tongue between {his} teeth|and {he} hummed a song]. But {fail1}.
<"[Hmm|Oh well]," said {h}.> <{His} friend {f.full}, who came by, did not laugh, but {f.his} mouth moved a little.>

{He} made another. [That one was even worse, because {fail2}.|This time, {fail2}.] <{h} [stamped {his} foot|threw
{his} apron on the floor].> "I give up!" {he} said. {mom} looked at the two of them, side by side. "This one taught
you one thing," said {mom}, "and that one taught you another. [Now you know two things.|So you are two things
closer.]" <{h} [had not thought of it like that|thought about it].>

So {he} made a third one. <It was not [pretty|straight].> <It had bits of the first one in it, and bits of the
second.> {h} held {his} breath. And the third {thing} {works}! <"[I did it!|Look at that!]" {he} shouted[, and {he}
danced around the yard|].> [{mom} wanted to throw the old ones away, but {h} kept them on {his} shelf. "They are my
teachers," {he} said.|"How did you do it?" asked {mom}. "First you make two bad ones," said {h}.]

== the glasses: child
where = on the top of the clock / in the fridge, next to the butter / on the nose of the snowman / on the dog
for1 = the book / the phone / the newspaper

[{mom} was looking for the glasses again.|"My glasses are gone!" cried {mom}.|{opening} {day}, {mom} could not find
the glasses.] "I cannot read {for1} without them," said {mom}. "I will find them," said {h}. {He} looked [under the
chair|in the wash] and found a coin. {He} looked behind the [books|pillow] and found [a comb|half a cookie]. <{He}
looked in the cat's basket and found the cat.> [No glasses.|But there were no glasses.]

"[Maybe a mouse needed them|Maybe they walked away]," said {h}. {mom} laughed, [and then walked into the door|but
could not see at what]. "[What did you do today?|Where have you been?]" asked {h}. Then {he} looked up, and there they
were, {where}! "[Found them|I see them]!" said {h}.

<[{joy}.|{h} laughed until {his} side hurt.]> "Where?" asked {mom}. {h} [pointed|could only point]. "[So there they
are|But I looked there]," said {mom}. Then {mom} read {him} a story, a long one, and [did all the voices|they both put
on glasses for it].

== the pot band: child folk
tool1 & tool2 = a pot and a spoon & a comb and paper / an old bucket & two pan lids / a box and a string & a row of
    bottles
who = old Mister Stone / old Miss Gray

[{opening} {He} loved noise.|Bang, bang, boom! {h.full} had made a drum out of the trash can.] {He} played {tool1},
and {his} friend {f.full} played {tool2}. [They called it a band.|It was music, they said.] <[Dogs howled.|Babies
cried.]> Then {who} [opened a window|came out]. "[Stop that noise|Enough]!" {who} shouted. "[My ears!|I want to
sleep!]" They ran.

<"[Nobody likes our music|We are too good for this street]," said {f}.> The next day, {h} saw that the curtains of
{who} were closed. [They were closed all week.|They stayed closed for days.] <"Maybe we broke the ears," said {f}.>
{h} knocked. "[Are you angry?|Are you well?]" {he} asked. {Who} sat in a dark room, with a picture and a dusty
[violin|flute]. "I used to play, too," said {who}. "[But now there is no one left to play with.|But it is sad to play
alone.]"

{h} looked at {f}. "[We have no tune|We only have noise]," {he} said. "[Will you play with us|Will you teach us]?"
<[It took some asking.|First the answer was no. Then it was maybe.]> That evening, the band had three players, and
[people opened their windows to listen|the whole street came out to dance]. <[It was loud, but it was the right kind
of loud.|"Again!" cried the babies, or it sounded like it.]> <After the last song, {who} said, "Tomorrow, from the
top, and watch the beat.">

== the loose tooth: child
how & result = tied a string to the door & the dog opened it too slowly / bit into an apple & only the apple came out
    / wiggled it all day & it still held on / asked the cat to help & the cat walked away

[{opening} {He} had a loose tooth.|Wiggle, wiggle. {h.full} had a loose tooth.] All {his} friends had lost one
already<, and {his} friend {f} had lost four>. {He} {how}, but {result}. <"Do not pull it," said {mom}. "It knows when
to go."> "[It will never come out|I will be a hundred years old, with a baby tooth]," said {h}.

At dinner, they had {food}. {h} forgot all about the tooth, because [{mom} told a joke|{he} was so hungry]. [Then
something was missing.|Then {he} stopped chewing.] {His} tongue found a hole! "It is gone!" {he} cried. But where was
it? <[They looked on the floor.|They looked under the table.]> "I think I ate it," said {h}[ in a small voice|].
<Nobody laughed, but it was hard.>

So {h} wrote a letter and put it under {his} pillow. "Dear tooth fairy," it said, "[I ate the tooth by mistake|the
tooth is in my tummy]. [Please come anyway.|Sorry.]" In the morning, there was a [gold|silver] coin, and a tiny note.
"[I believe you|That happens a lot]," said the note. <"[Brush the others well.|Next time, chew slowly.]"> {h} smiled
at {himself} in the mirror. {He} looked [like a pirate|much older].

== the puppy who hated baths: puppy
mud = chased a duck into the pond / rolled in something brown / dug up the whole garden

[{opening} {He} loved mud and hated soap.|{H.a} could hear the word bath from a mile away.] {day}, {he} {mud}. "[You
smell like old fish|Look at you]!" said {f}, the {f.kind} {he} lived with. "[Bath time|Into the tub]!" {h} ran. {He}
hid [behind the sofa|in the closet|under a hat], but {his} tail stuck out. <They ran around the table four times. It
was a good game.>

<[{f} put a bone by the tub, but {h} took it and ran.|{f} tried to carry {h}, and then they were both covered in
mud.]> "[Fine|Then stay dirty]," said {f}, and {f.he} went to bed. {h} wanted to jump up beside {f.him}, as {he} did
every night. "No," said {f}. "[Not with that mud.|You smell.]" The floor was [cold and hard|cold]. {h} [looked at the
moon for a long time|could not sleep].

Splash! {f} sat up. <[Somebody was in the tub.|The noise came from the bathroom.]> There was {h}, with [one paw on the
tap|a duck made of rubber in {his} mouth] and soap on {his} nose. "[You are a good dog|Well, well]," said {f}, and
rubbed {him} dry. [Soon they were both under the blanket, and {h} smelled of roses.|That night, they slept nose to
nose.] <In the morning, it rained, and there was new mud everywhere.>

== finders keepers: child paw folk
found & worth = gold coin & a new drum / red purse & a big bag of candy / silver ring & a pony, or at least half a
    pony
loser & loser.he = old woman & she / tired farmer & he / young mother & she / old man & he

[{opening} {day}, {he} found a {found} in the street.|{day}, something shone in front of {h.full}. It was a {found}!]
"[Now I can buy|This is enough for] {worth}," {he} thought. <{He} [danced down the road|sang all the way down the
road].> Then {he} saw a {loser}, bent over and looking at the ground. {h} put {his} {hand} over {his} pocket[ and
walked faster|].

"[Did you see a {found}|Have you found anything]?" the {loser} asked. "[It was all I had|I need it so much]." <{h}
felt the {found} in {his} pocket. It was [warm|heavy].> "[No|I saw nothing]," said {h}. [The words tasted like
soap.|It was a very small lie, but it tasted like soap.] All the way to the shop, the {found} got heavier. <In the
window was what {he} wanted. It did not shine as it had before.>

{h} turned around and ran. "Wait!" {he} called. "[I found it. It was in my pocket all the time.|I did see it. Here it
is.]" The {loser} looked at the {found}, and then at {him}. <"[It is not easy to come back|You ran a long way],"
{loser.he} said[ softly|].> {h} had empty pockets and a light heart. [{He} went home the long way and jumped over
every puddle.|That evening, there was a knock at the door. On the step stood a loaf of warm bread.]
"""
